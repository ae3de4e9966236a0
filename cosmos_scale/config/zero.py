"""The section `zero`: how states are sharded."""

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from cosmos_scale.config.section import RESUME_MAY_CHANGE, Section, refuse, whole_number


class ZeroConfig(Section):
    """How DeepSpeed shards the student's and the teacher's states."""

    stage: Annotated[Literal[0, 1, 2, 3], BeforeValidator(whole_number)] = Field(
        1,
        description="what is sharded over the ranks; 0: nothing; 1: fp32 masters, moments and teacher's average; "
        "2: gradients too; 3: weights too",
        json_schema_extra=RESUME_MAY_CHANGE,
    )
    offload: bool = Field(
        False,
        description="whether masters, moments and average stay in the host's memory and are updated there",
        json_schema_extra=RESUME_MAY_CHANGE,
    )
    gradient_dtype: Literal["fp32", "bf16"] = Field(
        "fp32",
        description="number format in which gradients travel and are summed over the ranks; fp32 rounds no gradient of "
        "a lower precision; bf16 halves the bytes, and rounds each gradient and each partial sum",
        json_schema_extra=RESUME_MAY_CHANGE,
    )

    def _check_rules(self) -> None:
        if self.offload and self.stage == 0:
            refuse("offload", self.offload, "needs stage 1, 2 or 3: DeepSpeed offloads shards", ["stage"])
