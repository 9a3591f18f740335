"""The answers of a round."""

from __future__ import annotations

import msgspec

from hpc_distkv.control.messages import Answer


class Answers(dict[int, Answer]):
    """The answers of a round by instance, those left out being like `plain`."""

    def __init__(self, plain: Answer) -> None:
        super().__init__()
        self.plain = plain

    def __missing__(self, instance: int) -> Answer:
        answer = self[instance] = Answer(round=self.plain.round)
        return answer

    def encode(self, instances: int) -> list[bytes]:
        """The messages to all instances."""
        encoder = msgspec.msgpack.Encoder()
        encoded = [encoder.encode(self.plain)] * instances
        for instance, answer in self.items():
            answer.admit_before = self.plain.admit_before
            answer.drain, answer.stop = self.plain.drain, self.plain.stop
            encoded[instance] = encoder.encode(answer)
        return encoded
