"""What goes out on a rank's stream, and in which order."""

import threading
import time

from tinsmith.internal.v1 import trainer_link_service_pb2 as pb
from tinsmithd.trainer.outgoing import OUTPUTS_BYTES_MAX, Outgoing


def outputs(command_id: int, count: int = 1) -> pb.AttachRequest:
    some = pb.DatumOutputs(outputs=[b"datum"] * count)
    return pb.AttachRequest(command_id=command_id, outputs=some)


def piece(data: bytes) -> pb.AttachRequest:
    return pb.AttachRequest(command_id=9, piece=pb.StatePiece(file_name="f", data=data))


def done(command_id: int, count: int = 0) -> pb.AttachRequest:
    message = pb.Done(outputs=outputs(command_id, count).outputs if count else None)
    return pb.AttachRequest(command_id=command_id, done=message)


def test_outputs_that_wait_together_are_one_message() -> None:
    """Of one command only, with its end; what comes in between keeps its place."""
    outgoing = Outgoing()
    alive = pb.AttachRequest(alive=pb.Alive())
    failed = pb.AttachRequest(command_id=3, failed=pb.Failed())
    for message in (
        *(outputs(1), outputs(1, 2), done(1)),
        *(outputs(2), alive, outputs(2), done(2)),
        *(outputs(3), outputs(3), failed),
        *(done(4), outputs(5), done(5)),
    ):
        outgoing.put(message)
    outgoing.end()
    assert list(outgoing) == [
        done(1, 3),
        *(outputs(2), alive, done(2, 1)),
        *(outputs(3, 2), failed),
        *(done(4), done(5, 1)),
    ]


def test_outputs_wait_a_moment_for_the_end_of_their_command() -> None:
    """Both leave together when the end comes at once; without it, the outputs leave alone."""
    outgoing = Outgoing(outputs_wait_s=60)
    outgoing.put(outputs(1))
    end = threading.Timer(0.1, lambda: (outgoing.put(done(1)), outgoing.end()))
    end.start()
    assert list(outgoing) == [done(1, 1)]
    without = Outgoing(outputs_wait_s=0)
    messages = iter(without)
    without.put(outputs(1))
    assert next(messages) == outputs(1)
    without.put(done(1))
    without.end()
    assert list(messages) == [done(1)]


def test_large_outputs_are_not_put_together() -> None:
    """Beyond a size, and those of one more datum."""
    outgoing = Outgoing()
    large = outputs(1)
    large.outputs.outputs[0] = bytes(OUTPUTS_BYTES_MAX // 2)
    for _ in range(5):
        copy = pb.AttachRequest()
        copy.CopyFrom(large)
        outgoing.put(copy)
    outgoing.end()
    assert [len(message.outputs.outputs) for message in outgoing] == [2, 2, 1]


def test_answers_go_before_pieces() -> None:
    """A piece leaves when nothing else is there, and only then is there room for the next one."""
    outgoing = Outgoing()
    sent: list[bool] = []

    def send() -> None:
        sent.append(outgoing.put_later(piece(b"1")))
        sent.append(outgoing.put_later(piece(b"2")))

    sender = threading.Thread(target=send)
    outgoing.put(done(1))
    sender.start()
    messages = iter(outgoing)
    while not sent:
        time.sleep(0.001)
    outgoing.put(done(2))
    assert [next(messages) for _ in range(3)] == [done(1), done(2), piece(b"1")]
    sender.join(10)
    outgoing.put(done(3))
    assert [next(messages), next(messages)] == [done(3), piece(b"2")]
    assert sent == [True, True]


def test_the_end_of_the_stream_lets_everybody_go() -> None:
    """Who waits for room, and who waits for messages; later pieces are not taken."""
    outgoing = Outgoing()
    assert outgoing.put_later(piece(b"1"))
    answers: list[bool] = []
    sender = threading.Thread(target=lambda: answers.append(outgoing.put_later(piece(b"2"))))
    sender.start()
    outgoing.end()
    sender.join(10)
    assert answers == [False]
    assert list(outgoing) == []
    assert not outgoing.put_later(piece(b"3"))

    waiting = Outgoing()
    found: list[list[pb.AttachRequest]] = []
    reader = threading.Thread(target=lambda: found.append(list(waiting)))
    reader.start()
    waiting.put(done(1))
    waiting.end()
    reader.join(10)
    assert found == [[done(1)]]
