"""The agent's side of the kernel: the only importer of bcc."""
