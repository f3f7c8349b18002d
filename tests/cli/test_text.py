from dirtylog.cli.text import printable


def test_what_is_printable_stays() -> None:
    assert printable("pc.ram [bold] ä 内存") == "pc.ram [bold] ä 内存"


def test_what_would_do_something_to_a_terminal_is_escaped() -> None:
    assert printable("a\x1b[2J\nb\x9b\u202e") == "a\\x1b[2J\\nb\\x9b\\u202e"
