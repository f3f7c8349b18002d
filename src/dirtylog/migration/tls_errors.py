"""OpenSSL's errors in words that say who has to do what."""

import ssl
from typing import Final

from dirtylog.errors import PeerError, ProtocolError, RefusedError
from dirtylog.migration.protocol import Role

_SAME_AUTHORITY: Final = "let both sides' ca-cert.pem be that of the authority which signed both sides' certificates"
_CLOCKS: Final = "renew it, or set the clock that is wrong"
_TLS_1_3: Final = "use the same version of dirtylog on both sides, with an OpenSSL that has TLS 1.3"

_VERIFIED: Final = {
    9: _CLOCKS,  # X509_V_ERR_CERT_NOT_YET_VALID and what follows: openssl/x509_vfy.h
    10: _CLOCKS,
    18: _SAME_AUTHORITY,
    19: _SAME_AUTHORITY,
    20: _SAME_AUTHORITY,
    21: _SAME_AUTHORITY,
    7: _SAME_AUTHORITY,
    26: "use a certificate with the extended key usage of that side: serverAuth or clientAuth",
    62: "migrate to a name that the certificate has, or give that name with --tls-hostname",
    64: "migrate to a name that the certificate has, or give that name with --tls-hostname",
}
"""What to do about a certificate, by OpenSSL's number for what is wrong with it."""

_ALERTS: Final = {
    "UNKNOWN_CA": _SAME_AUTHORITY,
    "DECRYPT_ERROR": _SAME_AUTHORITY,
    "CERTIFICATE_EXPIRED": "renew this side's certificate, or set the clock that is wrong",
    "PROTOCOL_VERSION": _TLS_1_3,
}
"""What to do about the peer's refusal, by its alert (RFC 8446, section 6.2)."""

_NO_TLS: Final = {
    Role.SOURCE: "start it with 'dirtylog run --incoming tls:HOST:PORT --tls-creds DIR'",
    Role.DESTINATION: "migrate to tls:HOST:PORT, with --tls-creds DIR; and see who else connects here",
}


def why_refused(error: ssl.SSLError, role: Role) -> PeerError:
    """An error in the handshake, as one of ours; ``role`` is this side's."""
    peer = _peer(role)
    if isinstance(error, ssl.SSLCertVerificationError):
        return ProtocolError(
            f"the {peer}'s certificate is not accepted: {error.verify_message.rstrip('.')}",
            remedy=_VERIFIED.get(error.verify_code, "look at it with 'openssl x509 -noout -text -in FILE'"),
        )
    reason = error.reason or str(error)
    _, is_alert, alert = reason.rpartition("_ALERT_")
    if is_alert:
        return RefusedError(
            f"the {peer} refused the TLS connection: {_words(alert)}",
            remedy=_ALERTS.get(alert, f"see what the {peer} says about it"),
        )
    if reason in ("WRONG_VERSION_NUMBER", "HTTP_REQUEST", "HTTPS_PROXY_REQUEST"):
        return ProtocolError(f"the {peer} does not speak TLS", remedy=_NO_TLS[role])
    if reason == "UNSUPPORTED_PROTOCOL":
        return ProtocolError(f"the {peer} does not speak TLS 1.3", remedy=_TLS_1_3)
    if reason == "PEER_DID_NOT_RETURN_A_CERTIFICATE":
        return ProtocolError(f"the {peer} shows no certificate", remedy="give it client-cert.pem and client-key.pem")
    return why_broken(error, role)


def why_broken(error: ssl.SSLError, role: Role) -> ProtocolError:
    """An error after it. An alert is no refusal then: only a message tells what became of the guest (M1)."""
    return ProtocolError(
        f"TLS with the {_peer(role)} failed: {_words(error.reason or str(error))}",
        remedy="see whether something changes bytes on their way",
    )


def _peer(role: Role) -> str:
    return "destination" if role is Role.SOURCE else "source"


def _words(name: str) -> str:
    return name.lower().replace("_", " ")
