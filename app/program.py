"""How a command ends: in one line that says what went wrong, and with an exit status. [ours]"""

import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable

import torch
from tqdm import tqdm

from app import ranks
from app.user_code import ObjectiveFailed

SMALLER = "micro_batch_size, sample_batch_size, eval_batch_size or reward_batch_size"


class Terminated(KeyboardInterrupt):
    """SIGTERM: whoever stops the program wants the same as with Ctrl-C."""


def terminate(number: int, frame: object) -> None:
    """What SIGTERM does; a second one ends the program at once."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    raise Terminated


def run_to_the_end(name: str, work: Callable[[], None]) -> int:
    """Do the work of the program `name`. Returns its exit status: 0; 2 where something is wrong, which is then said in
    one line; 130 stopped by Ctrl-C; 143 by SIGTERM; 141 where nobody reads what it prints.
    """
    for output in (sys.stdout, sys.stderr):
        if hasattr(output, "reconfigure"):
            output.reconfigure(errors="replace")  # a terminal that has no λ shall not end the run

    def say(line: str) -> None:
        if ranks.first():
            tqdm.write(line, file=sys.stderr)  # a line of its own, whatever bars there are

    bad_input = False
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_, **__: say(f"warning: {message}")  # our own, of `fedmoa.py`
        wanted = {signal.SIGTERM: terminate, signal.SIGINT: signal.default_int_handler}
        if threading.current_thread() is not threading.main_thread():
            wanted = {}  # Python allows it nowhere else
        before = {number: signal.signal(number, handler) for number, handler in wanted.items()}
        try:
            work()
            sys.stdout.flush()
            ranks.leave(together=True)
            return 0
        except (ranks.Elsewhere, ranks.Ended) as error:
            say(f"{name}: error: {error}")
            ranks.leave(together=isinstance(error, ranks.Elsewhere))
            return 2
        except (ValueError, ObjectiveFailed) as error:
            fault, bad_input = " ".join(str(error).split()), True
        except (torch.OutOfMemoryError, MemoryError) as error:
            what = "memory" if isinstance(error, MemoryError) else "GPU memory"
            fault = f"out of {what} ({str(error).split('. ')[0]}); lower {SMALLER}, then go on with --resume"
        except BrokenPipeError:  # `| head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 141
        except OSError as error:
            name = error.filename2 or error.filename or "a file"  # the second: where it was to be moved to
            fault = f"{name} cannot be read or written ({error.strerror or error})"
        except KeyboardInterrupt as stop:
            say("stopped")
            ranks.leave(together=False)
            return 143 if isinstance(stop, Terminated) else 130
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
    ranks.tell(fault, bad_input)
    say(f"{name}: error: {fault}")
    ranks.leave(together=True)
    return 2
