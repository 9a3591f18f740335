"""How long a step, an exchange and a move take."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

from hpc_distkv.errors import OptionError
from hpc_distkv.simulate.cluster import ELSEWHERE, NODE, SWITCH, Cluster, Link, LinkSpeeds
from hpc_distkv.simulate.models import ModelShape

LEVELS = (NODE, SWITCH, ELSEWHERE)


class Line(NamedTuple):
    """A time that grows with a count: seconds at once, and seconds each."""

    fixed: float = 0.0
    each: float = 0.0


class HostRates(NamedTuple):
    """The coefficients of the host's memory, in seconds."""

    move: Line
    """One way of rBlocks between device and host's memory."""
    kv_token: float
    """To read one KV token in place, all layers."""
    pair: float
    """To attend with one query row to one KV token in place, all layers."""
    exchange: Line
    """Round trip of query rows to the host's processor, all layers."""
    beside: bool
    """Whether a device computes what is at home beside it: else the processor that attends, and
    copies, is the rank's own."""


class Rates(NamedTuple):
    """The coefficients of one model on one kind of instance, in seconds."""

    step: float
    """Per step that computes tokens."""
    weights: float
    """To read the weights of the linear layers once."""
    decode_row: float
    """Linear layers of one decode row, head included."""
    prefill_token: float
    """Linear layers of one prompt token."""
    kv_token: float
    """Attention of one decode row to one KV token, all layers."""
    pair: float
    """Attention of one prompt token to one KV token, all layers."""
    ring: Line
    tree: Line
    """All-reduces of a step by its tokens, in two ways of which the faster is taken."""
    exchange: tuple[Line, ...]
    """By level: round trip of query rows, all layers."""
    move: tuple[Line, ...]
    """By level: one way of rBlocks."""
    host: HostRates | None
    """None: the cluster says nothing of its hosts."""


class CostModel:
    """Seconds of what one instance of `tp` ranks does. All counts are those of the instance.

    Linear layers take the longer of computing and reading the weights once (roofline). Attention
    of decodes is bound by reading KV, that of prompts by FLOPs. All ranks of an instance do the
    same at once, so an instance takes the time of one rank and of the all-reduces between them.

    Not modelled: contention between instances for a shared link, and a prompt's chunk so small
    that reading its KV, not computing, bounds its attention.
    """

    def __init__(self, cluster: Cluster, model: ModelShape, tp: int, block_size: int) -> None:
        """Raises OptionError if `model` or `cluster` cannot be cut into instances of `tp`."""
        cluster.instances(tp)
        self.block_bytes = model.block_bytes(tp, block_size)
        """Of one rBlock on each rank."""
        way = measured_rates if cluster.measured is not None else roofline_rates
        self.rates = way(cluster, model, tp, self.block_bytes)

    def step_time(
        self,
        decode_rows: int,
        decode_kv: float,
        prefill_tokens: int,
        prefill_pairs: float,
    ) -> float:
        """Seconds of one forward, without communication between instances; 0 for nothing to do.

        `decode_kv`: Σ over decode rows of the KV tokens each reads here. `prefill_pairs`: Σ over
        prompt tokens of the KV tokens each attends to here; a causal chunk of n tokens after p
        others has n·p + n·(n + 1)/2.
        """
        rates = self.rates
        tokens = decode_rows + prefill_tokens
        if not tokens:
            return 0.0
        attention = self.attention_time(decode_kv, prefill_pairs)
        linear = decode_rows * rates.decode_row + prefill_tokens * rates.prefill_token
        ring = rates.ring[0] + tokens * rates.ring[1]
        tree = rates.tree[0] + tokens * rates.tree[1]
        return rates.step + max(linear, rates.weights) + min(ring, tree) + attention

    def attention_time(self, decode_kv: float, pairs: float) -> float:
        """Seconds of attention alone: of the local part, or of MicroAttention for guests."""
        return decode_kv * self.rates.kv_token + pairs * self.rates.pair

    def read_for(self, rows: int, tokens: int) -> float:
        """KV tokens that cost as much to attend to for one decode row as `tokens` do for `rows`
        decode rows at once: they are read once, and multiplied for every row."""
        rates = self.rates
        return tokens * max(1.0, rows * rates.pair / rates.kv_token if rates.kv_token else 1.0)

    def exchanges_time(self, legs: Iterable[tuple[int, int]]) -> float:
        """Seconds per step, all layers, of several exchanges (rows, level) at the same time: the
        query rows' way to a creditor at `level` and their partial results' way back, the creditor's
        MicroAttention left out. For a debtor with several creditors, and for a creditor with
        several debtors: latencies run at once, bytes one after another.

        Per layer two latencies, and Q out, MA and statistics back over the bandwidth. Each rank
        carries its heads' share over its own link to the same lane of the creditor.
        """
        latency = seconds = 0.0
        for rows, level in legs:
            if rows:
                fixed, each = self.rates.exchange[level]
                latency = max(latency, fixed)
                seconds += rows * each
        return latency + seconds

    def move_time(self, blocks: int, level: int) -> float:
        """Seconds to move rBlocks to an instance at `level`, all lanes at once, one rBlock behind
        the other."""
        fixed, each = self.rates.move[level]
        return fixed + blocks * each if blocks else 0.0

    @staticmethod
    def overlap(local: float, exchange: float) -> float:
        """Seconds of a step's `exchange` that its `local` attention does not hide.

        In every layer the queries leave first, and the attention to what is at home runs while
        they and the partial results are under way; the next linear layer needs both. All layers
        are alike, so their sums can be compared. `exchange` may include the creditor's
        MicroAttention where that runs beside the local attention (DistAttention, arXiv 2401.02669).
        """
        return max(0.0, exchange - local)


def measured_rates(cluster: Cluster, model: ModelShape, tp: int, block_bytes: float) -> Rates:
    """Rates from coefficients that were measured. OptionError if `tp` is not 1."""
    measured = cluster.measured
    assert measured is not None
    if tp != 1:
        raise OptionError(
            f"tensor parallel size {tp}: the cluster's speed was measured on instances of one rank"
        )
    exchange = Line(model.layers * measured.exchange, model.wire_bytes / measured.bytes_per_second)
    move = Line(0.0, block_bytes / measured.bytes_per_second)
    return Rates(
        step=measured.fixed,
        weights=0.0,
        decode_row=measured.per_token,
        prefill_token=measured.prefill_per_token,
        kv_token=measured.per_kv_token,
        pair=measured.per_pair,
        ring=Line(),
        tree=Line(),
        exchange=(exchange,) * len(LEVELS),
        move=(move,) * len(LEVELS),
        host=HostRates(move, measured.per_kv_token, measured.per_pair, Line(), beside=False),
    )


def roofline_rates(cluster: Cluster, model: ModelShape, tp: int, block_bytes: float) -> Rates:
    """Rates from a device's speeds and a cluster's links."""
    roofline, links = cluster.roofline, cluster.links
    assert roofline is not None
    assert links is not None
    matmul = tp * roofline.flops * roofline.matmul_efficiency
    read = tp * roofline.bandwidth * roofline.weight_efficiency
    kv_bytes = model.kv_bytes_per_token * model.kv_share(tp)
    overhead = roofline.step_overhead + model.layers * roofline.layer_overhead
    ring, tree = _all_reduces(cluster, links, model, tp)
    lanes = min(tp, cluster.gpus_per_node)
    ways = [(links.at(level), _bytes_per_second(links.at(level), lanes)) for level in LEVELS]

    def exchange(link: Link, rate: float) -> Line:
        return Line(2 * model.layers * link.latency, model.wire_bytes / tp / rate)

    def move(link: Link, rate: float) -> Line:
        return Line(link.latency, block_bytes / rate)

    host = None
    if there := cluster.host:
        bus = there.bus, _bytes_per_second(there.bus, lanes)
        host = HostRates(
            move=move(*bus),
            kv_token=kv_bytes / (there.bandwidth * there.read_efficiency),
            pair=model.pair_flops / (tp * there.flops * there.compute_efficiency),
            exchange=exchange(*bus),
            beside=True,
        )
    return Rates(
        step=overhead,
        weights=model.parameters * model.bytes_per_value / read,
        decode_row=2 * model.parameters / matmul,
        prefill_token=2 * model.layer_parameters / matmul,
        kv_token=kv_bytes / (roofline.bandwidth * roofline.decode_efficiency),
        pair=model.pair_flops / (tp * roofline.flops * roofline.prefill_efficiency),
        ring=ring,
        tree=tree,
        exchange=tuple(exchange(*way) for way in ways),
        move=tuple(move(*way) for way in ways),
        host=host,
    )


def _bytes_per_second(link: Link, lanes: int) -> float:
    """What is left of a link for each of an instance's `lanes` on a node."""
    return link.rate / min(lanes, link.gpus_per_link)


def _all_reduces(
    cluster: Cluster, links: LinkSpeeds, model: ModelShape, tp: int
) -> tuple[Line, Line]:
    """The two all-reduces of a token's hidden state in each layer: by ring, and by tree.

    For n ranks and B bytes a ring takes 2(n − 1) latencies and 2(n − 1)/n · B of the slowest link;
    a tree 2⌈log₂ n⌉ latencies and 2 B. Between nodes, rings run over all links of a node at once.
    """
    if tp == 1:
        return Line(), Line()
    link = links.at(cluster.level_within(tp))
    rate = _bytes_per_second(link, tp)
    if tp > cluster.gpus_per_node:
        rate = min(links.node.rate, link.rate * cluster.gpus_per_node / link.gpus_per_link)
    count = 2 * model.layers
    seconds = count * model.hidden * model.bytes_per_value / rate
    ring = Line(count * 2 * (tp - 1) * link.latency, 2 * (tp - 1) / tp * seconds)
    tree = Line(count * 2 * math.ceil(math.log2(tp)) * link.latency, 2 * seconds)
    return ring, tree
