import ssl

import pytest

from dirtylog.errors import ProtocolError, RefusedError
from dirtylog.migration.protocol import Role
from dirtylog.migration.tls_errors import why_broken, why_refused


def _error(reason: str | None) -> ssl.SSLError:
    error = ssl.SSLError(1, "[SSL] something")
    error.reason = reason  # type: ignore[assignment] # OpenSSL has errors without one
    return error


def _verification(code: int, message: str) -> ssl.SSLCertVerificationError:
    error = ssl.SSLCertVerificationError(1, "certificate verify failed")
    error.verify_code, error.verify_message = code, message
    return error


@pytest.mark.parametrize(
    ("code", "remedy"),
    [
        (9, "clock"),
        (10, "renew it"),
        (18, "authority"),
        (19, "authority"),
        (20, "authority"),
        (26, "extended key usage"),
        (62, "--tls-hostname"),
        (64, "--tls-hostname"),
        (50, "openssl x509"),
    ],
)
def test_certificate_that_is_not_accepted_has_cause_and_remedy(code: int, remedy: str) -> None:
    error = why_refused(_verification(code, "it is bad."), Role.SOURCE)
    assert isinstance(error, ProtocolError)
    assert error.cause == "the destination's certificate is not accepted: it is bad"
    assert error.remedy is not None
    assert remedy in error.remedy


@pytest.mark.parametrize(
    ("reason", "words", "remedy"),
    [
        ("TLSV1_ALERT_UNKNOWN_CA", "unknown ca", "authority"),
        ("SSLV3_ALERT_CERTIFICATE_EXPIRED", "certificate expired", "renew this side's certificate"),
        ("TLSV1_ALERT_PROTOCOL_VERSION", "protocol version", "TLS 1.3"),
        ("TLSV13_ALERT_CERTIFICATE_REQUIRED", "certificate required", "see what the source says about it"),
    ],
)
def test_peers_refusal_is_told_in_its_words(reason: str, words: str, remedy: str) -> None:
    error = why_refused(_error(reason), Role.DESTINATION)
    assert isinstance(error, RefusedError)
    assert error.cause == f"the source refused the TLS connection: {words}"
    assert error.remedy is not None
    assert remedy in error.remedy


@pytest.mark.parametrize(
    ("reason", "cause"),
    [
        ("WRONG_VERSION_NUMBER", "the source does not speak TLS"),
        ("HTTP_REQUEST", "the source does not speak TLS"),
        ("UNSUPPORTED_PROTOCOL", "the source does not speak TLS 1.3"),
        ("PEER_DID_NOT_RETURN_A_CERTIFICATE", "the source shows no certificate"),
        ("DECRYPTION_FAILED_OR_BAD_RECORD_MAC", "TLS with the source failed: decryption failed or bad record mac"),
        (None, "TLS with the source failed: [ssl] something"),
    ],
)
def test_what_the_peer_did_wrong_is_told_with_a_remedy(reason: str | None, cause: str) -> None:
    error = why_refused(_error(reason), Role.DESTINATION)
    assert isinstance(error, ProtocolError)
    assert error.cause == cause
    assert error.remedy


@pytest.mark.parametrize("reason", ["TLSV1_ALERT_UNKNOWN_CA", "SSLV3_ALERT_BAD_RECORD_MAC"])
def test_alert_after_the_handshake_is_no_refusal(reason: str) -> None:  # M1
    error = why_broken(_error(reason), Role.SOURCE)
    assert isinstance(error, ProtocolError)
    assert error.cause.startswith("TLS with the destination failed: ")
