"""`python -m tersenet`, and `torchrun ... -m tersenet`: the same as the command `tersenet`."""

from tersenet.cli.main import main

main()
