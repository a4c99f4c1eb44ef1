"""The key/value cache of a story, which is kept from turn to turn."""

from dataclasses import dataclass, field

from transformers import DynamicCache


@dataclass
class StoryCache:
    """Keys and values of one story so far; `keys` say what stands at each of its positions (`position_keys`)."""

    keys: list[int | tuple] = field(default_factory=list)
    values: DynamicCache | None = None

    def reuse(self, keys: list[int | tuple]) -> int:
        """Crops to the longest common beginning, leaving at least one position to compute; returns its length."""
        shared = 0
        for mine, theirs in zip(self.keys, keys[:-1], strict=False):
            if mine != theirs:
                break
            shared += 1
        if self.values is not None and shared < len(self.keys):
            self.values.crop(shared - len(self.keys))  # negative: how many to take off the end
            self.keys = self.keys[:shared]
        return shared
