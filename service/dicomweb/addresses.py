"""Where a study, series or instance is retrieved from (PS3.18 10.1)."""

from dataclasses import dataclass

PREFIX = "/dicom-web"


@dataclass(frozen=True)
class Addresses:
    """URLs below the service's own, as the caller reached it."""

    root: str  # without a slash at its end

    def study(self, study_uid: str) -> str:
        return f"{self.root}{PREFIX}/studies/{study_uid}"

    def series(self, study_uid: str, series_uid: str) -> str:
        return f"{self.study(study_uid)}/series/{series_uid}"

    def instance(self, study_uid: str, series_uid: str, sop_uid: str) -> str:
        return f"{self.series(study_uid, series_uid)}/instances/{sop_uid}"
