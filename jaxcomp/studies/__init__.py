"""Studies: many recipes on one model, measured alike; one table and one picture."""

from jaxcomp.studies.compare import compare_reports
from jaxcomp.studies.grid import plan_study
from jaxcomp.studies.output import print_study
from jaxcomp.studies.run import run_study
from jaxcomp.studies.study import Study, StudyRow, load_study, with_settings

__all__ = [
    "Study",
    "StudyRow",
    "compare_reports",
    "load_study",
    "plan_study",
    "print_study",
    "run_study",
    "with_settings",
]
