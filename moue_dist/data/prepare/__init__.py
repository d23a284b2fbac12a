"""Text files into tokenized files: what is read, by whom, and how the parts become one."""
