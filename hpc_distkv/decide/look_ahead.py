"""Look-ahead: step n+1 is planned, and launched, while the device computes step n.

The sequences of step n+1 go on with tokens that the host has not read: `Sequence.expect` puts a
placeholder where `Sequence.learn` will put the token. Whatever is decided between two steps is out
of reach in this mode: a step planned ahead (`Scheduler.plan(ahead=True)`) moves no rBlock, preempts
nobody and resumes no swapped-out sequence; where one of these is due, step n+2 is planned after
step n+1 has ended. A sequence that ends with step n has a token too many in step n+1, and keeps its
rBlocks until that step is over (`Instance.learn`).
"""

from __future__ import annotations

from hpc_distkv.decide.instance import Instance
from hpc_distkv.decide.plan import Plan


def may_plan_ahead(instance: Instance, plan: Plan, *, deferred: bool, followed: bool) -> bool:
    """True if step n+1 may be planned and launched while step n, of `plan`, runs. `deferred`: the
    device runs behind the host; `followed`: the instance has other ranks. False

    * on a device that is done when a launch returns, and after a step without sequences
    * with guests on an instance of several ranks: their queries come in behind all hops that were
      launched (`comm.gpu.meeting_transport`)
    * where rBlocks move, or may have to in step n+1: a moved rBlock must be written, and belong to
      a sequence that goes on
    * with rBlocks of running sequences in the host's memory: they come and go between steps
    * with migration: a sequence is handed over with all its tokens
    * with windows in all layers: what falls behind them is freed between steps
    * where memory was short: a sequence may have to be preempted, whose rBlocks are in use
    * for sequences whose penalties count tokens, which the host does
    """
    scheduler, rm, config = instance.scheduler, instance.rm, instance.config
    return (
        deferred
        and bool(plan.scheduled)
        and not (followed and rm.lender.guests)
        and not (plan.moving or scheduler.moving or rm.swap.serves)
        and not (config.policy.migrate or config.window or scheduler.short)
        and not any(
            (rules := sequence.request.sampling.rules)
            and (rules.frequency_penalty or rules.presence_penalty)
            for sequence, _ in plan.scheduled
        )
    )
