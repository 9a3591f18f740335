"""A cluster as a TOML file describes it: sizes, places and speeds."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import msgspec

from hpc_distkv.errors import OptionError
from hpc_distkv.simulate.models import ModelShape
from hpc_distkv.simulate.toml import read_toml

NODE, SWITCH, ELSEWHERE = 0, 1, 2
"""Levels of distance, the classes of `control.lending.links`: same node, same switch, farther."""

Count = Annotated[int, msgspec.Meta(ge=1)]
Positive = Annotated[float, msgspec.Meta(gt=0, le=1e30)]
Amount = Annotated[float, msgspec.Meta(ge=0, le=1e30)]
Share = Annotated[float, msgspec.Meta(gt=0, le=1)]


class DeviceSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What one rank computes on."""

    name: str
    memory: Positive
    """Bytes."""
    activation_reserve: Amount
    """Bytes kept free of weights and KV: activations, workspaces, communication buffers."""


class Roofline(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Speeds of one device, overheads in seconds, and the shares of the speeds kernels reach."""

    flops: Positive
    """Dense FLOP/s in the model's dtype."""
    bandwidth: Positive
    """Bytes/s of device memory."""
    step_overhead: Amount
    """Per step: scheduling, launch, sampling."""
    layer_overhead: Amount
    """Per layer: launches and gaps between kernels."""
    matmul_efficiency: Share
    """Of `flops`, in linear layers."""
    weight_efficiency: Share
    """Of `bandwidth`, reading weights."""
    prefill_efficiency: Share
    """Of `flops`, in the attention of prompts."""
    decode_efficiency: Share
    """Of `bandwidth`, reading KV in the attention of decodes."""


class Link(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The way of a message between two ranks."""

    latency: Amount
    """Seconds."""
    bandwidth: Positive
    """Bytes/s in one direction."""
    efficiency: Share
    """Of `bandwidth`, for large messages."""
    gpus_per_link: Count = 1
    """GPUs of a node that share the bandwidth."""

    @property
    def rate(self) -> float:
        """Bytes/s of large messages."""
        return self.bandwidth * self.efficiency


class LinkSpeeds(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The links of the three levels."""

    node: Link
    switch: Link
    elsewhere: Link

    def at(self, level: int) -> Link:
        """The link of a level."""
        return (self.node, self.switch, self.elsewhere)[level]


class HostSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A node's memory, its processors, and the way from there to a device."""

    memory: Positive
    """Bytes of a node that its ranks may have."""
    bandwidth: Positive
    """Bytes/s of that memory: the part of one device."""
    flops: Positive
    """FLOP/s of the processors in float32: the part of one device."""
    read_efficiency: Share
    """Of `bandwidth`, reading KV in attention."""
    compute_efficiency: Share
    """Of `flops`, in attention."""
    bus: Link
    """Between that memory and a device; one direction at a time counts."""


class Measured(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Seconds measured with one model on instances of one rank."""

    fixed: Amount
    """Per step that computes tokens."""
    per_token: Amount
    """Per decode row, attention left out."""
    prefill_per_token: Amount
    """Per prompt token, attention left out."""
    per_kv_token: Amount
    """Per KV token that a decode row reads, all layers."""
    per_pair: Amount
    """Per query–key pair of a prompt's attention, all layers."""
    exchange: Amount
    """Per layer: one exchange of a decode step with a partner."""
    bytes_per_second: Positive
    """Of rBlocks that move, and of large exchanges."""


class Cluster(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Nodes of equal devices. Ranks fill nodes in order, and so do instances of `tp` ranks.

    Its speed is either a roofline with links, or measured.
    """

    nodes: Count
    gpus_per_node: Count
    device: DeviceSpec
    nodes_per_switch: Count = 1
    gpu_memory_utilization: Share = 0.9
    """Share of a device's memory for weights, activations and KV."""
    roofline: Roofline | None = None
    links: LinkSpeeds | None = None
    host: HostSpec | None = None
    """Of devices that a roofline describes; None: ranks cannot use the memory of their hosts. With
    measured speeds ranks compute on the host itself, and that says all."""
    measured: Measured | None = None

    def __post_init__(self) -> None:
        if (self.roofline is None) != (self.links is None):
            raise ValueError("the tables `roofline` and `links` belong together: give both")
        if (self.roofline is None) == (self.measured is None):
            raise ValueError("give either `measured`, or `roofline` and `links`")
        if self.host is not None and self.measured is not None:
            raise ValueError("the table `host` goes with `roofline`, not with `measured`")

    @classmethod
    def load(cls, path: str | Path) -> Cluster:
        """Read a description. Raises OptionError that names the file and the key at fault."""
        return read_toml(path, cls, "description of a cluster")

    def instances(self, tp: int) -> int:
        """Instances of `tp` ranks that fit. An instance lies within a node or fills whole nodes;
        OptionError if `tp` does not allow that."""
        gpus = self.nodes * self.gpus_per_node
        if tp < 1 or tp > gpus or (self.gpus_per_node % tp and tp % self.gpus_per_node):
            raise OptionError(
                f"tensor parallel size {tp} does not fit {self.nodes} nodes of "
                f"{self.gpus_per_node}: it must divide a node or be a number of whole nodes"
            )
        return gpus // tp

    def node_of(self, instance: int, tp: int) -> int:
        """Node of an instance's first rank."""
        return instance * tp // self.gpus_per_node

    def switch_of(self, instance: int, tp: int) -> int:
        """Switch of an instance's first rank."""
        return self.node_of(instance, tp) // self.nodes_per_switch

    def level_within(self, tp: int) -> int:
        """The farthest that two ranks of some instance are apart."""
        if tp <= self.gpus_per_node:
            return NODE
        nodes = tp // self.gpus_per_node
        inside = self.nodes <= self.nodes_per_switch or self.nodes_per_switch % nodes == 0
        return SWITCH if inside else ELSEWHERE

    def kv_blocks(self, model: ModelShape, tp: int, block_size: int) -> int:
        """rBlocks of `block_size` tokens that an instance has room for: on each of its ranks lies
        the share of its heads. OptionError, with the arithmetic, if there is room for none."""
        self.instances(tp)
        block = model.block_bytes(tp, block_size)
        weights = model.weight_bytes / tp
        usable = self.device.memory * self.gpu_memory_utilization
        free = usable - weights - self.device.activation_reserve
        if free < block:
            raise OptionError(
                f"{model.name} with tensor parallel size {tp} does not fit on {self.device.name}: "
                f"{_gb(self.device.memory)} × {self.gpu_memory_utilization:g} usable − "
                f"{_gb(weights)} weights − {_gb(self.device.activation_reserve)} activations = "
                f"{_gb(free)}, and one rBlock takes {_gb(block)}; raise the tensor parallel size"
            )
        return int(free // block)

    def host_blocks(self, model: ModelShape, tp: int, block_size: int, memory: int) -> int:
        """rBlocks of an instance for which each of its ranks has `memory` bytes of its host.
        OptionError, with the reason, if that cannot be."""
        if self.host is None and self.measured is None:
            raise OptionError(
                "--host-kv-memory: the description of the cluster says nothing of its hosts: add "
                "the table `host`"
            )
        block = int(model.block_bytes(tp, block_size))
        if memory < block:
            raise OptionError(
                f"one rBlock takes {block} bytes, but --host-kv-memory gives {memory}: give more"
            )
        if self.host is not None and memory * self.gpus_per_node > self.host.memory:
            raise OptionError(
                f"--host-kv-memory gives {_gb(memory)} to each of {self.gpus_per_node} ranks of a "
                f"node, which has {_gb(self.host.memory)}: give less"
            )
        return memory // block


def _gb(count: float) -> str:
    return f"{count / 1e9:.4g} GB"
