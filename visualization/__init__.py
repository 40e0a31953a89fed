"""Pictures of runs, drawn from their records."""

from utils.command import begin_module

begin_module()
