"""``python -m tools.fuzz.engine TARGET [libFuzzer's options] [folders or files]``: one target under atheris."""

import sys

import atheris

with atheris.instrument_imports(include=["dirtylog.migration", "tools.fuzz.targets"]):
    from tools.fuzz.targets import TARGETS


def main() -> None:
    """Hand over to libFuzzer, which ends the process."""
    program, target, *arguments = sys.argv
    atheris.Setup([program, *arguments], TARGETS[target]())
    atheris.Fuzz()


if __name__ == "__main__":
    main()
