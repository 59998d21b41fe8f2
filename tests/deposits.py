"""What rank 0 does with a state that is saved, for tests of those who take it."""

from checkpoints import to_files
from tinsmithd.domain import ModelState
from tinsmithd.trainer.state_sender import leave_state
from tinsmithd.training.models.deposits import Deposit
from tinsmithd.training.models.staging import Staged


async def hand_over(state: ModelState, deposit: Deposit | None, staged: Staged) -> bool:
    """Leave a state in a deposit, or send it where it cannot be left; returns whether it was."""
    if deposit is not None:
        deposit.begun.set()
    left = None if deposit is None else leave_state(state, deposit.folder)
    if deposit is None or left is None:
        for name, data in to_files(state).items():
            await staged.write(name, data)
        return False
    deposit.files = {file.file_name: file.size_bytes for file in left}
    return True
