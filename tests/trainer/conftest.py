from tests.quiet import quiet  # noqa: F401

# Doctests are sought in every file, by importing it; after this one Lightning's log lines would go to another logger.
collect_ignore = ["pytorch_lightning_script.py"]
