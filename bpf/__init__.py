"""The C programs, compiled on the node by bcc."""
