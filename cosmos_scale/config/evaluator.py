"""The keys that evaluators of every kind have."""

from pydantic import Field

from cosmos_scale.config.section import PLAIN_NAME, RESUME_MAY_CHANGE, Section, refuse


class EvaluatorConfig(Section):
    """The keys of an evaluator of any kind."""

    kind: str
    name: str = Field(
        description="stands before the names of its numbers where it is not the kind",
        json_schema_extra=RESUME_MAY_CHANGE,
    )
    every: int = Field(
        0,
        ge=0,
        description="steps between evaluations; another one follows the last step; 0: never during training",
        json_schema_extra=RESUME_MAY_CHANGE,
    )

    def describe(self) -> str:
        """A few words on what is measured on what."""
        return self.kind

    def _check_rules(self) -> None:
        if not PLAIN_NAME.fullmatch(self.name):
            refuse(
                "name",
                self.name,
                "must be a folder's plain name: at most 200 letters, digits, . _ - and no leading dot",
            )
