"""Plans of steps: made once for equal costs, in the step or beside the one before it.

Every rank plans for itself, and all must come to the same plan at the same step. So nothing depends on how far a thread
has got: a plan that was begun in the background is waited for, never replaced by another one."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable

from ultraep_compile.executor.program import Program, check_fits, program_of
from ultraep_compile.executor.settings import Settings
from ultraep_compile.schedules import Problem, plan

_KEPT = 32  # plans


class Planner:
    """The programs of one rank's steps."""

    def __init__(self, settings: Settings, rank: int) -> None:
        self.settings, self.rank = settings, rank
        self._programs: OrderedDict[Problem, _Background | Program] = OrderedDict()

    def __len__(self) -> int:
        return len(self._programs)

    def prepare(self, problem: Problem) -> None:
        """Begin to plan a step in the background, with all the effort that makes it fast."""
        if problem not in self._programs:
            self._keep(problem, _Background(lambda: self._made(problem, thorough=True)))

    def program(self, problem: Problem) -> Program:
        """The program of a step. One that was not prepared is planned here with little effort, to keep the step short.

        Raises: ScheduleError."""
        found = self._programs.get(problem)
        if isinstance(found, _Background):
            try:
                found = found.result()
            except BaseException:
                del self._programs[problem]
                raise
        if found is None:
            found = self._made(problem, thorough=False)
        self._keep(problem, found)
        return found

    def _keep(self, problem: Problem, found: _Background | Program) -> None:
        self._programs[problem] = found
        self._programs.move_to_end(problem)
        if len(self._programs) > _KEPT:
            self._programs.popitem(last=False)

    def _made(self, problem: Problem, thorough: bool) -> Program:
        settings = self.settings
        schedule = settings.schedule
        if schedule is None:
            group = settings.generator_group or (1 if settings.generator == "split" else 0)
            schedule = plan(problem, settings.method, settings.base, settings.encoder_memory, group, thorough)
        check_fits(schedule, problem)
        return program_of(schedule, self.rank)


class _Background:
    """A program that a thread is making."""

    def __init__(self, make: Callable[[], Program]) -> None:
        self._make = make
        self._program: Program | None = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="ultraep-plan", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._program = self._make()
        except BaseException as error:  # raised where the plan is wanted
            self._error = error

    def result(self) -> Program:
        """Wait for it."""
        self._thread.join()
        if self._error is not None:
            raise self._error
        assert self._program is not None
        return self._program
