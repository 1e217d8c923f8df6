"""The profiler's knobs."""

import msgspec

from shared.errors import ConfigInvalid


class ProfilerConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    window_s: float = 10.0
    types_max: int = 4  # request types per model
    seed_samples: int = 64  # first types are made from this many requests, or the first window's
    memory_requests: float = 1000.0  # a type's centre is about the mean of its last so many
    refine_ln: float = 1.5  # farther from every centre than this (a factor of 4.5): a new type
    refine_samples: int = 3  # once so many such requests came in one window
    coarsen_ln: float = 0.75  # two centres nearer than this (a factor of 2.1) may become one
    idle_windows_max: int = 60  # a type unseen this long gives its number back
    settle_windows: int = 12  # after so many a window's arrivals are told by when they arrived
    requests_max: int = 50_000  # counted per model and window; the rest is dropped, and said so
    models_max: int = 16
    inbox_max: int = 4096

    def checked(self) -> "ProfilerConfig":
        """Self, if every value makes sense; raises ConfigInvalid."""
        for field in self.__struct_fields__:
            value = getattr(self, field)
            if value <= 0:
                raise ConfigInvalid(
                    field=f"profiler.{field}", value=value, remedy="use more than 0"
                )
        if self.coarsen_ln >= self.refine_ln:
            raise ConfigInvalid(
                field="profiler.coarsen_ln",
                value=self.coarsen_ln,
                remedy=f"make it smaller than refine_ln ({self.refine_ln})",
            )
        return self
