"""What a guardrail holds and how good it is: `print_report` for a terminal, `write_page` for a browser."""

from saeguard.report.page import write_page
from saeguard.report.terminal import print_report

__all__ = ["print_report", "write_page"]
