"""The init step: redirect rules in a pod's network namespace.

`plan` decides (pure), `apply` acts through `legacy` or `nft`, `command` is the command
line.
"""
