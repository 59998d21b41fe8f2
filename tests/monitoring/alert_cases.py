"""What makes each alert fire, and what does not: series for `promtool test rules`.

Each case has numbers minute by minute, in promtool's words: `4+2x30` begins with 4 and rises by 2
thirty times.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from monitoring import files, promql

TRAINING = '{job="tinsmith",server="training",instance="t:1"}'
SAMPLER = '{job="tinsmith",server="sampler",instance="s:1"}'
CHECKPOINT = '{job="tinsmith",server="checkpoint",instance="c:1"}'
GATEWAY = '{job="tinsmith",server="gateway",instance="g:1"}'
_T, _S, _G = "tinsmith_training_", "tinsmith_sampler_", "tinsmith_gateway_"
DAY_S = 86_400

Values = Mapping[str, str]
"""Values minute by minute, by series."""


@dataclass(frozen=True)
class Case:
    """An alert, and what it is to say.

    Attributes:
        fires: Series with which it fires.
        quiet: Series with which it does not.
        description: What it says then.
        labels: Of the alert, besides name and severity.
        minutes: After which it is looked at.
    """

    fires: Values
    quiet: Values
    description: str
    labels: Mapping[str, str] = field(default_factory=dict)
    minutes: int = 30


def _steady(name: str, where: str, bad: float, good: float) -> tuple[Values, Values]:
    series = f"{name}{where}"
    return {series: f"{bad}+0x1000"}, {series: f"{good}+0x1000"}


def _rising(name: str, where: str, bad: float, good: float = 0) -> tuple[Values, Values]:
    series = f"{name}{where}"
    return {series: f"0+{bad}x1000"}, {series: f"0+{good}x1000"}


def _handled(code: str, where: str = TRAINING) -> str:
    labels = f'grpc_method="Sample",grpc_code="{code}"'
    return f"grpc_server_handled_total{where[:-1]},{labels}}}"


_SERVING = f"tinsmith_serving{TRAINING[:-1]},service="
_CERTIFICATE = f"tinsmith_certificate_left_seconds{GATEWAY[:-1]},certificate="
_REQUESTS = f'{_G}requests_total{GATEWAY[:-1]},status="200"}}'
_FREE, _SIZE = f"tinsmith_disk_free_bytes{TRAINING}", f"tinsmith_disk_size_bytes{TRAINING}"
_AT_TRAINING = {"job": "tinsmith", "server": "training", "instance": "t:1"}

CASES: Mapping[str, Case] = {
    "TinsmithTrainingAbsent": Case(
        {"tinsmith_build_info{}": "1+0x60"},
        {f"{_T}ranks{TRAINING}": "0+0x60"},
        "Nothing has answered as a Training server for ten minutes.",
        {"job": "tinsmith"},
    ),
    "TinsmithRankGroupAway": Case(
        *_steady(f"{_T}ranks", TRAINING, 0, 1), "Calls of training wait; none is lost."
    ),
    "TinsmithRanksRestart": Case(
        {f"{_T}rank_groups_attached_total{TRAINING}": "1+0x60 2+1x60"},
        {f"{_T}rank_groups_attached_total{TRAINING}": "1+0x60 2+0x60"},
        "10 rank groups attached within an hour.",
        minutes=70,
    ),
    "TinsmithHeartbeatsLate": Case(
        {f"{_T}rank_silence_seconds{TRAINING}": "1+0x27 12 1+0x30"},
        {f"{_T}rank_silence_seconds{TRAINING}": "1+0x60"},
        "They come every two seconds; the last silence was 12 s. After rank_lease_s the group is "
        "replaced.",
    ),
    "TinsmithStalledProgress": Case(
        {f"{_T}rank_command_seconds{TRAINING}": "0+60x60"},
        {f"{_T}rank_command_seconds{TRAINING}": "600+0x60"},
        "It was given 30m 0s ago.",
    ),
    "TinsmithQueueNotMoving": Case(
        {
            f"{_T}calls_pending{TRAINING}": "3+0x60",
            f'{_T}computed_tokens_total{TRAINING[:-1]},kind="forward"}}': "900+0x60",
            f"{_T}steps_total{TRAINING}": "9+0x60",
        },
        {
            f"{_T}calls_pending{TRAINING}": "3+0x60",
            f'{_T}computed_tokens_total{TRAINING[:-1]},kind="forward"}}': "900+9x60",
            f"{_T}steps_total{TRAINING}": "9+0x60",
        },
        "3 calls or more have been waiting.",
    ),
    "TinsmithModelsLost": Case(
        *_steady(f"{_T}models_lost", TRAINING, 2, 0), "2 models cannot be brought back."
    ),
    "TinsmithModelsComeBackSlowly": Case(
        {f'{_SERVING}"tinsmith.v1.TrainingService/recovery"}}': "0+0x60"},
        {f'{_SERVING}"tinsmith.v1.TrainingService/recovery"}}': "1+0x60"},
        "Their calls wait.",
        minutes=40,
    ),
    "TinsmithTrainingFenced": Case(
        *_steady(f"{_T}journal_fenced", TRAINING, 1, 0),
        "This one lost it to another and ends.",
    ),
    "TinsmithTrainingRestarts": Case(
        {f"{_T}epoch{TRAINING}": "7+0x20 8+1x40"},
        {f"{_T}epoch{TRAINING}": "7+0x20 8+0x40"},
        "5 more processes had the journal within an hour.",
        minutes=25,
    ),
    "TinsmithJournalUnwritable": Case(
        *_steady(f"{_T}journal_writable", TRAINING, 0, 1),
        "New calls are refused; none that was taken in is lost.",
    ),
    "TinsmithJournalSlow": Case(
        {
            f'{_T}journal_commit_seconds_bucket{TRAINING[:-1]},le="0.5"}}': "0+0x60",
            f'{_T}journal_commit_seconds_bucket{TRAINING[:-1]},le="1.0"}}': "0+60x60",
            f'{_T}journal_commit_seconds_bucket{TRAINING[:-1]},le="+Inf"}}': "0+60x60",
        },
        {
            f'{_T}journal_commit_seconds_bucket{TRAINING[:-1]},le="0.5"}}': "0+60x60",
            f'{_T}journal_commit_seconds_bucket{TRAINING[:-1]},le="1.0"}}': "0+60x60",
            f'{_T}journal_commit_seconds_bucket{TRAINING[:-1]},le="+Inf"}}': "0+60x60",
        },
        "One commit of a hundred takes more than 995ms.",
    ),
    "TinsmithSnapshotsFail": Case(
        *_rising(f"{_T}snapshots_failed_total", TRAINING, 1),
        "A model that comes back computes more again, and journals grow.",
    ),
    "TinsmithSnapshotsLate": Case(
        *_steady(f"{_T}snapshot_age_seconds", TRAINING, 4200, 60),
        "Its oldest step that no snapshot has is 1h 10m 0s old.",
    ),
    "TinsmithSnapshotDamaged": Case(
        *_rising(f"{_T}snapshots_damaged_total", TRAINING, 1),
        "The one before it is used. The disk may be failing.",
    ),
    "TinsmithDataLoss": Case(
        {_handled("DataLoss"): "0+0x27 1+0x30"},
        {_handled("DataLoss"): "0+0x60", _handled("NotFound"): "0+9x60"},
        "Sample of training met something damaged or lost.",
        {"server": "training", "grpc_method": "Sample"},
    ),
    "TinsmithDiskFillsUp": Case(
        {_FREE: "30-0.05x500", _SIZE: "100+0x500"},
        {_FREE: "30+0x500", _SIZE: "100+0x500"},
        "That of training, if it fills on as in the last six hours.",
        _AT_TRAINING,
        minutes=70,
    ),
    "TinsmithDiskNearlyFull": Case(
        {_FREE: "5+0x60", _SIZE: "100+0x60"},
        {_FREE: "15+0x60", _SIZE: "100+0x60"},
        "5% of that of training are free.",
        _AT_TRAINING,
    ),
    "TinsmithSweepsFail": Case(
        *_rising("tinsmith_checkpoint_sweeps_failed_total", CHECKPOINT, 1),
        "The Checkpoint server's disk fills up with them.",
    ),
    "TinsmithSamplerSaturated": Case(
        {
            f"{_S}requests_waiting{SAMPLER}": "200+0x60",
            f"{_S}requests_running_max{SAMPLER}": "128+0x60",
        },
        {
            f"{_S}requests_waiting{SAMPLER}": "100+0x60",
            f"{_S}requests_running_max{SAMPLER}": "128+0x60",
        },
        "200 requests wait.",
    ),
    "TinsmithAdaptersWait": Case(
        {
            f"{_S}requests_fetching{SAMPLER}": "4+0x60",
            f"{_S}adapters_bytes{SAMPLER}": "95+0x60",
            f"{_S}adapters_bytes_max{SAMPLER}": "100+0x60",
        },
        {
            f"{_S}requests_fetching{SAMPLER}": "4+0x60",
            f"{_S}adapters_bytes{SAMPLER}": "50+0x60",
            f"{_S}adapters_bytes_max{SAMPLER}": "100+0x60",
        },
        "The adapters in use fill the Samplers' memory.",
    ),
    "TinsmithGatewayFails": Case(
        {_REQUESTS: "0+100x60", f"{_G}failures_total{GATEWAY}": "0+10x60"},
        {_REQUESTS: "0+100x60", f"{_G}failures_total{GATEWAY}": "0+1x60"},
        "10% of all requests.",
    ),
    "TinsmithGatewayFull": Case(
        {
            f"{_G}results_under_way{GATEWAY}": "90+0x60",
            f"{_G}results_under_way_max{GATEWAY}": "100+0x60",
        },
        {
            f"{_G}results_under_way{GATEWAY}": "9+0x60",
            f"{_G}results_under_way_max{GATEWAY}": "100+0x60",
            f"{_G}requests_running{GATEWAY}": "9+0x60",
            f"{_G}requests_running_max{GATEWAY}": "100+0x60",
        },
        "90% of its requests or futures are taken.",
    ),
    "TinsmithServerDown": Case(
        *_steady("up", SAMPLER, 0, 1),
        "sampler at s:1.",
        {"job": "tinsmith", "server": "sampler", "instance": "s:1"},
    ),
    "TinsmithNotServing": Case(
        {f'{_SERVING}"tinsmith.v1.TrainingService"}}': "0+0x60"},
        {f'{_SERVING}"tinsmith.v1.TrainingService"}}': "1+0x60"},
        "tinsmith.v1.TrainingService has not been SERVING for a quarter of an hour.",
        {"server": "training", "service": "tinsmith.v1.TrainingService"},
    ),
    "TinsmithErrors": Case(
        {_handled("Internal"): "0+0x27 1+0x30"},
        {_handled("Internal"): "1+0x60", _handled("InvalidArgument"): "0+9x60"},
        "Sample of training.",
        {"server": "training", "grpc_method": "Sample"},
    ),
    "TinsmithCallsRefused": Case(
        {_handled("OK"): "0+20x60", _handled("Unavailable"): "0+80x60"},
        {_handled("OK"): "0+80x60", _handled("Unavailable"): "0+20x60"},
        "80% of those of training.",
        {"server": "training"},
    ),
    "TinsmithKeysDamaged": Case(
        *_steady("tinsmith_keys_readable", TRAINING, 0, 1),
        "training goes on with what it read last: no key can be revoked, and a restart fails.",
        {"server": "training"},
    ),
    "TinsmithKeysGuessed": Case(
        *_rising("tinsmith_keys_refusals_total", TRAINING, 120, 6),
        "2.0 in a second at training.",
        {"server": "training"},
    ),
    "TinsmithCertificateExpires": Case(
        {f'{_CERTIFICATE}"tls"}}': f"{10 * DAY_S}+0x100"},
        {f'{_CERTIFICATE}"tls"}}': f"{30 * DAY_S}+0x100"},
        "tls of gateway in 10d 0h 0m 0s.",
        {"server": "gateway", "certificate": "tls"},
        minutes=70,
    ),
    "TinsmithCertificateExpiresNow": Case(
        {f'{_CERTIFICATE}"tls"}}': f"{DAY_S}+0x100"},
        {f'{_CERTIFICATE}"tls"}}': f"{10 * DAY_S}+0x100"},
        "tls of gateway in 1d 0h 0m 0s.",
        {"server": "gateway", "certificate": "tls"},
    ),
    "TinsmithFilesRunOut": Case(
        {f"process_open_fds{TRAINING}": "90+0x60", f"process_max_fds{TRAINING}": "100+0x60"},
        {f"process_open_fds{TRAINING}": "9+0x60", f"process_max_fds{TRAINING}": "100+0x60"},
        "training has 90% of its files open.",
        _AT_TRAINING,
    ),
}


def document() -> dict[str, Any]:
    """The cases, as promtool reads them."""
    return {
        "rule_files": [str(files.ALERTS)],
        "evaluation_interval": "1m",
        "tests": [_test(names, fires) for fires in (True, False) for names in _together()],
    }


def _together() -> list[list[str]]:
    """Alerts that no series has two of: they can be tried at once, which takes less time."""
    groups: list[tuple[set[str], int, list[str]]] = []
    for name, case in CASES.items():
        named = {series for series, _ in promql.named(files.alerts()[name]["expr"]).series}
        for series, minutes, names in groups:
            if not series & named and minutes == case.minutes:
                series |= named
                names.append(name)
                break
        else:
            groups.append((named, case.minutes, [name]))
    return [names for _, _, names in groups]


def _test(names: Sequence[str], fires: bool) -> dict[str, Any]:
    found: dict[str, str] = {}
    for name in names:
        found |= CASES[name].fires if fires else CASES[name].quiet
    return {
        "interval": "1m",
        "input_series": [{"series": series, "values": values} for series, values in found.items()],
        "alert_rule_test": [
            {
                "eval_time": f"{CASES[name].minutes}m",
                "alertname": name,
                "exp_alerts": [_said(name)] if fires else [],
            }
            for name in names
        ],
    }


def _said(name: str) -> dict[str, Any]:
    alert, case = files.alerts()[name], CASES[name]
    return {
        "exp_labels": {**case.labels, **alert["labels"]},
        "exp_annotations": {**alert["annotations"], "description": case.description},
    }
