"""Which pictures the engine core has really been given."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary, WeakValueDictionary

from vllm.multimodal.cache import BaseMultiModalProcessorCache
from vllm.multimodal.cache.lru import LruKeyReplicatedSenderCache
from vllm.multimodal.inputs import MultiModalFeatureSpec, MultiModalKwargsItem


class SentPictures:
    """Keeps a front end's picture cache from promising what was never sent.

    vLLM records a picture as known to the engine when its prompt is rendered, and sends the next
    request with that picture without data. If the first one is refused or dropped before it is
    sent, the engine never gets the picture. Here a picture counts as known once a request with it
    has passed all checks; until then its data is sent again, or, when nobody holds it any more,
    processed again.
    """

    def __init__(self) -> None:
        self._unsent: set[str] = set()
        self._items: WeakValueDictionary[str, MultiModalKwargsItem] = WeakValueDictionary()

    @staticmethod
    def of(cache: BaseMultiModalProcessorCache | None) -> SentPictures | None:
        """The one of this cache; None for caches that promise nothing."""
        if not isinstance(cache, LruKeyReplicatedSenderCache):
            return None
        return _OF_CACHE.setdefault(cache, SentPictures())

    def mark(self, features: Sequence[MultiModalFeatureSpec]) -> None:
        """The engine core is being sent a request with these features."""
        self._unsent.difference_update(one.mm_hash for one in features if one.data is not None)

    def recorded(self, mm_hash: str, item: MultiModalKwargsItem) -> None:
        """The cache has just recorded this item as known to the engine."""
        self._items[mm_hash] = item
        self._unsent.add(mm_hash)

    def is_unsent(self, mm_hash: str) -> bool:
        """Whether the item was recorded, and not sent."""
        return mm_hash in self._unsent

    def data_of(self, mm_hash: str) -> MultiModalKwargsItem | None:
        """The recorded item's data, if anyone still holds it."""
        return self._items.get(mm_hash)

    def lost(self) -> set[str]:
        """What was recorded, not sent, and is held by nobody any more."""
        return self._unsent.difference(self._items.keys())

    def forget(self, mm_hash: str) -> None:
        """It is recorded no longer."""
        self._unsent.discard(mm_hash)


_OF_CACHE: WeakKeyDictionary[BaseMultiModalProcessorCache, SentPictures] = WeakKeyDictionary()


def sending(
    cache: BaseMultiModalProcessorCache | None,
) -> BaseMultiModalProcessorCache | None:
    """The cache as the processing of one prompt is to see it."""
    sent = SentPictures.of(cache)
    return cache if cache is None or sent is None else SendingCache(cache, sent)


class SendingCache(BaseMultiModalProcessorCache):
    """The picture cache as one prompt's processing sees it: unsent items come with their data."""

    def __init__(self, cache: BaseMultiModalProcessorCache, sent: SentPictures) -> None:
        self._cache = cache
        self._sent = sent
        # Held, so that an item found here lasts until this prompt is processed.
        self._unsent: dict[str, MultiModalKwargsItem] = {}
        for mm_hash in sent.lost():
            self._give_up(mm_hash)

    def is_cached_item(self, mm_hash: str) -> bool:
        if self._sent.is_unsent(mm_hash):
            item = self._sent.data_of(mm_hash)
            if item is None:
                # Its last holder, a refused prompt, went at this very moment.
                self._give_up(mm_hash)
            else:
                self._unsent[mm_hash] = item
        return self._cache.is_cached_item(mm_hash)

    def get_and_update_item(self, mm_item: Any, mm_hash: str) -> Any:
        known = self._cache.is_cached_item(mm_hash)
        item, updates = self._cache.get_and_update_item(mm_item, mm_hash)
        if not known:
            assert item is not None, "a cache that does not know an item returns it"
            self._unsent[mm_hash] = item
            self._sent.recorded(mm_hash, item)
        return self._unsent.get(mm_hash, item), updates

    def touch_sender_cache_item(self, mm_hash: str) -> None:
        self._cache.touch_sender_cache_item(mm_hash)

    def _give_up(self, mm_hash: str) -> None:
        """Nobody can send it any more: it has to be processed again."""
        self._cache.invalidate(mm_hash)
        self._sent.forget(mm_hash)

    def clear_cache(self) -> None:
        self._cache.clear_cache()

    def make_stats(self, *, delta: bool = False) -> Any:
        return self._cache.make_stats(delta=delta)
