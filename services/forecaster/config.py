"""The forecaster's knobs."""

from typing import Literal

import msgspec

from shared.errors import ConfigInvalid


class ForecasterConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    method: Literal["race", "last_value", "ewma"] = "race"  # race: whichever was nearer so far
    horizon_windows: int = 3  # how many windows ahead a forecast speaks of
    ewma_rate: float = 0.3  # weight of the newest window in the moving average
    errors_max: int = 60  # forecasts remembered per predictor to compare them
    models_max: int = 16
    types_max: int = 64
    inbox_max: int = 1024

    def checked(self) -> "ForecasterConfig":
        """Self, if every value makes sense; raises ConfigInvalid."""
        for field in self.__struct_fields__:
            value = getattr(self, field)
            if field != "method" and value <= 0:
                raise ConfigInvalid(
                    field=f"forecaster.{field}", value=value, remedy="use more than 0"
                )
        if self.ewma_rate > 1.0:
            raise ConfigInvalid(
                field="forecaster.ewma_rate", value=self.ewma_rate, remedy="use at most 1"
            )
        return self
