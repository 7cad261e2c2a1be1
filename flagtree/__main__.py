"""`python -m flagtree`: the command line without the installed script."""

from flagtree.cli.app import main

main()
