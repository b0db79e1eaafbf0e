from tests.quiet import quiet  # noqa: F401
