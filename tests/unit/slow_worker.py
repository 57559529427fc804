"""A worker without tensors: it remembers which token's data every block holds, and reads it back."""

import numpy as np
from vllm.utils.math_utils import cdiv

from vllm_reroute.kv_cache.spec import StageSpec
from vllm_reroute.plan import late_pictures
from vllm_reroute.plan.batch_routing import BatchRouting
from vllm_reroute.plan.planning import plan_step
from vllm_reroute.plan.request_routing import RequestRouting
from vllm_reroute.plan.visual_spans import VisualSpans

ANSWER = 7
"""The token that the model always answers."""


class SlowWorker:
    """Follows a scheduler's outputs as a model runner does, and plans each step as it does.

    Each token's data has a key: what it depends on. Where nothing depends on the question (text,
    stages before the first decision, parked states) that is the tokens up to it, so that keys are
    equal exactly where blocks may be shared. What a turn has kept depends on all tokens up to its
    question's end. Elsewhere the key is the request's own.
    Every read is checked: an entry must have been written, and with the reader's own key.
    """

    def __init__(self, kv_cache_config, schedule, block_size, *, offers_parked):
        self.schedule, self.block_size, self.offers_parked = schedule, block_size, offers_parked
        specs = [group.kv_cache_spec for group in kv_cache_config.kv_cache_groups]
        self.layers = [spec.num_layers for spec in specs]
        stages = {spec.stage: i for i, spec in enumerate(specs) if isinstance(spec, StageSpec)}
        self.groups = [stages[stage] for stage in range(len(stages))]
        (self.parked,) = set(range(len(specs))) - set(self.groups)
        self.dense_stages = int(schedule.encoder_ratio is None)
        self.tables, self.keys, self.pictures = {}, {}, {}
        self.tags, self.cells, self.numbers = {}, {}, {}
        self.num_recalled = 0
        self.num_parked = self.num_fetched = self.num_reused = self.num_copied = 0

    def routing(self, request):
        return RequestRouting.of(
            VisualSpans.of(request.mm_features),
            request.prompt_token_ids,
            self.schedule,
            self.block_size,
            request.sampling_params.extra_args,
        )

    def execute(self, output, requests):
        """Run one step. requests: by id, as they are right after `schedule`. Returns its plan."""
        for name in output.finished_req_ids:
            self.tables.pop(name, None)
        self._take_tables(output)
        self.pictures |= late_pictures.take(output)
        for name, inputs in output.scheduled_encoder_inputs.items():
            sent = [self.pictures[name][number].data for number in inputs]
            assert None not in sent, "a picture that the worker has never been sent"
        self._copy(output.kv_cache_block_copies or ())
        batch = [requests[name] for name in output.num_scheduled_tokens]
        now = np.array([*output.num_scheduled_tokens.values()], dtype=np.int64)
        before = np.array([r.num_computed_tokens for r in batch], dtype=np.int64) - now
        routings = [self.routing(request) for request in batch]
        plan = plan_step(
            before,
            now,
            BatchRouting.of(routings, len(self.groups)),
            dense_stages=self.dense_stages,
            block_size=self.block_size,
            offers_parked=self.offers_parked,
        )
        for prefill in plan.prefills:
            self._score(prefill, batch[prefill.index])
        for stage in range(self.dense_stages):
            self._run_stage(plan, stage, batch, routings)
        if plan.boundary is not None:
            self._exchange(plan.boundary, batch)
        for stage in range(self.dense_stages, len(self.groups)):
            self._run_stage(plan, stage, batch, routings)
        return plan

    def _take_tables(self, output):
        for new in output.scheduled_new_reqs:
            self.tables[new.req_id] = [list(ids) for ids in new.block_ids]
            self.pictures[new.req_id] = new.mm_features
            self.num_reused += new.num_computed_tokens
        cached = output.scheduled_cached_reqs
        for name, ids in zip(cached.req_ids, cached.new_block_ids, strict=True):
            if name in cached.resumed_req_ids:
                self.tables[name] = [list(of_group) for of_group in ids]
            elif ids is not None:
                for table, new in zip(self.tables[name], ids, strict=True):
                    table += new

    def _copy(self, copies):
        """Before anything of the step runs."""
        for source, target in copies:
            self.tags[target] = self.tags[source]
            self.cells[target] = list(self.cells[source])
            self.numbers[target] = dict(self.numbers.get(source, {}))
        self.num_copied += len(copies)

    def _score(self, prefill, request):
        """A decision reads what is cached of earlier turns before its stage writes anything.

        Text before the first picture is put there in time, where it is of the same step.
        """
        routing, name = prefill.routing, request.request_id
        for stage in range(self.dense_stages, len(self.groups)):
            held, group = prefill.num_held(stage), self.groups[stage]
            text = min(held, routing.text_prefix)
            keys = self._stage_keys(request, routing, stage, held)
            for layer in range(self.layers[group]):
                blocks = self._blocks(name, group, layer, held)
                self._check(blocks, (group, layer), keys, name, text)
            if prefill.turn.recalls:
                self._check_numbers(prefill, stage, keys, name)
        self.num_recalled += prefill.num_recalled

    def _check_numbers(self, prefill, stage, keys, name):
        """Which visual tokens a stage holds is read where turns have been decided."""
        turns = [turn for turn in prefill.routing.turns.turns if turn.end <= prefill.first]
        assert turns and turns[-1].end <= prefill.turn.begin
        blocks = self._blocks(name, self.groups[stage], 0, len(keys))
        for turn in turns:
            for place in range(
                *(prefill.routing.kv_length(stage, n) for n in (turn.begin, turn.end))
            ):
                block, offset = divmod(place, self.block_size)
                found = self.numbers[blocks[block]].get(offset)
                assert found == keys[place], f"{name} takes {found} for {keys[place]}"

    def _run_stage(self, plan, stage, batch, routings):
        """All rows write before any reads: row pieces have a test of their own."""
        lengths, group = plan.stages[stage], self.groups[stage]
        work = []
        for i, request in enumerate(batch):
            end, ran = int(lengths.seq_lens[i]), int(lengths.query_lens[i])
            if ran:
                keys = self._stage_keys(request, routings[i], stage, end)
                work.append((request.request_id, keys, end - ran))
        for name, keys, begin in work:
            for layer in range(self.layers[group]):
                blocks = self._blocks(name, group, layer, len(keys))
                self._write(blocks, (group, layer), keys, begin)
            if plan.prefills and stage >= self.dense_stages:
                for place in range(begin, len(keys)):
                    block, offset = divmod(place, self.block_size)
                    first = self._blocks(name, group, 0, len(keys))[block]
                    self.numbers.setdefault(first, {})[offset] = keys[place]
        for name, keys, _ in work:
            for layer in range(self.layers[group]):
                blocks = self._blocks(name, group, layer, len(keys))
                self._check(blocks, (group, layer), keys, name)

    def _exchange(self, boundary, batch):
        pages = range(self.layers[self.parked])
        for places, write in ((boundary.parked, True), (boundary.fetched, False)):
            for i, position in zip(places.request, places.position, strict=True):
                request, position = batch[i], int(position)
                key = self._token_keys(request, position + 1)[position]
                for page in pages:
                    blocks = self._blocks(request.request_id, self.parked, page, position + 1)
                    block, offset = divmod(position, self.block_size)
                    tag = (self.parked, page)
                    if write:
                        self._put(blocks[block], tag, offset, key)
                    else:
                        found = self.tags.get(blocks[block])
                        assert found == tag, (
                            f"{request.request_id} finds {found} where {position} waits"
                        )
                        assert self.cells[blocks[block]][offset] == key, "a page of another token"
        self.num_parked += len(boundary.parked)
        self.num_fetched += len(boundary.fetched)

    def _blocks(self, name, group, layer, num_tokens):
        table = self.tables[name][group][layer :: self.layers[group]]
        needed = cdiv(num_tokens, self.block_size)
        assert len(table) >= needed, f"{name}: no block for a slot of group {group}"
        return table[:needed]

    def _write(self, blocks, tag, keys, begin):
        for place in range(begin, len(keys)):
            block, offset = divmod(place, self.block_size)
            self._put(blocks[block], tag, offset, keys[place])

    def _put(self, block, tag, offset, key):
        assert block, "the null block is nobody's"
        if self.tags.get(block) != tag:
            self.tags[block], self.cells[block] = tag, [None] * self.block_size
        self.cells[block][offset] = key

    def _check(self, blocks, tag, keys, name, begin=0):
        """begin: a whole block; what is before it is not read."""
        for i, block in enumerate(blocks):
            expect = keys[i * self.block_size : (i + 1) * self.block_size]
            if i < begin // self.block_size:
                continue
            assert self.tags.get(block) == tag, f"{name} reads a block of {self.tags.get(block)}"
            found = self.cells[block][: len(expect)]
            assert found == expect, f"{name} reads {found} in block {i} of {tag}, not {expect}"

    def _stage_keys(self, request, routing, stage, length):
        if routing is None or stage < self.dense_stages:
            return self._token_keys(request, length)
        if routing.keeps_turns:
            return self._kept_keys(request, routing, stage, length)
        text = min(length, routing.text_prefix)
        own = [(request.request_id, place) for place in range(text, length)]
        return self._token_keys(request, text) + own

    def _kept_keys(self, request, routing, stage, length):
        """Keys of text, and of what turns have kept, of how many tokens and by which question."""
        tokens = self._token_keys(request, routing.turns.needed(stage, length))
        keys, position, how = [], 0, ()
        for turn in routing.turns.turns:
            keys += [(*how, key) for key in tokens[position : turn.begin]]
            if len(keys) >= length:
                break
            how, position = (routing.keep, routing.recalls), turn.end
            count = turn.end - turn.begin - turn.deferred(stage)
            keys += [(*how, tokens[turn.end - 1], place) for place in range(count)]
        else:
            keys += [(*how, key) for key in tokens[position:]]
        keys = keys[:length]
        text = min(length, routing.text_prefix)
        return tokens[:text] + keys[text:]

    def _token_keys(self, request, length):
        """A key per token: all tokens up to it, pictures by their names, and the salt."""
        keys = self.keys.setdefault(request.request_id, [])
        if len(keys) < length:
            pictures = {
                feature.mm_position.offset + place: (feature.identifier, place)
                for feature in request.mm_features
                for place in range(feature.mm_position.length)
            }
            prompt = request.prompt_token_ids
            key = keys[-1] if keys else hash(request.cache_salt)
            for position in range(len(keys), length):
                token = prompt[position] if position < len(prompt) else ANSWER
                key = hash((key, token, pictures.get(position)))
                keys.append(key)
        return keys[:length]
