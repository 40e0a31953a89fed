"""What is claimed about speed and truth, runnable by anyone."""

from utils.command import begin_module

begin_module()
