"""`python -m mainrun_nb`: what there is."""
from mainrun_nb.cli import about_cli

about_cli()
