"""What is looked at: the report of a trace, as a page, as files for other programs, and in the terminal."""
