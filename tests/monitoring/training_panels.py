"""Rows of the dashboard: a cluster at a glance, and all that is of training."""

from monitoring.panel import (
    RED_ABOVE_0,
    Panel,
    Row,
    most,
    of,
    quantiles,
    rate,
    stat,
    total,
)

T, S = "tinsmith_training", "tinsmith_sampler"
FIRST_TIME = 'kind!="replay"'

OVERVIEW = Row(
    "Overview",
    [
        stat(
            "Ranks",
            "Ranks at work; 0 while there is no rank group, and calls of training wait.",
            total(f"{T}_ranks"),
            steps=((None, "red"), (1.0, "green")),
        ),
        stat("Models", "Models that exist.", total(f"{T}_models")),
        stat("Models lost", "Their state is gone.", total(f"{T}_models_lost"), steps=RED_ABOVE_0),
        stat(
            "Calls waiting",
            "Calls of training that were taken in and are not answered.",
            total(f"{T}_calls_pending"),
        ),
        stat("Samples running", "Requests that Samplers compute.", total(f"{S}_requests_running")),
        stat(
            "Disk left",
            "Of the fullest disk of journal and checkpoints.",
            f"min({of('tinsmith_disk_free_bytes')} / {of('tinsmith_disk_size_bytes')})",
            "percentunit",
            ((None, "red"), (0.1, "orange"), (0.25, "green")),
        ),
        stat(
            "Certificate left",
            "Until the first certificate expires; nothing without TLS.",
            f"min({of('tinsmith_certificate_left_seconds')})",
            "s",
            ((None, "red"), (2 * 86_400.0, "orange"), (14 * 86_400.0, "green")),
        ),
        stat(
            "Not serving",
            "Services of which health says NOT_SERVING, models on their way back included.",
            f"count({of('tinsmith_serving')} == 0) or vector(0)",
            steps=RED_ABOVE_0,
        ),
        Panel(
            "Versions",
            "Which release each process has.",
            [(f"count by (server, version) ({of('tinsmith_build_info')})", "")],
            kind="table",
            width=12,
        ),
        Panel(
            "Serving",
            "What health says: 1 while calls would succeed. recovery is 0 while models come back.",
            [(f"min by (service) ({of('tinsmith_serving')})", "{{service}}")],
            width=12,
        ),
    ],
)
OF_TRAINING = Row(
    "Training",
    [
        Panel(
            "Tokens per second",
            "What the ranks compute; replay is work done again after a crash.",
            [(rate(f"{T}_computed_tokens_total", by="kind"), "{{kind}}")],
        ),
        Panel(
            "Share of peak (MFU)",
            "Useful operations over what the ranks can make: over all time, and while they "
            "compute. Nothing where the peak is not known; the setting peak_flops says it.",
            [
                (
                    f"{rate(f'{T}_useful_flops_total')} / {most(f'{T}_peak_flops')}",
                    "over all time",
                ),
                (
                    f"{rate(f'{T}_useful_flops_total')}"
                    f" / {rate(f'{T}_engine_seconds_total', FIRST_TIME)}"
                    f" / {most(f'{T}_peak_flops')}",
                    "while computing",
                ),
            ],
            "percentunit",
        ),
        Panel(
            "Share of time that ranks compute",
            "What is missing to 1 is waiting for calls, order and fairness included.",
            [(rate(f"{T}_engine_seconds_total", by="kind"), "{{kind}}")],
            "percentunit",
        ),
        Panel(
            "Optimizer steps per second",
            "Each counted once however often it was replayed.",
            [(rate(f"{T}_steps_total"), "steps")],
        ),
        Panel(
            "Calls waiting",
            "Taken in and not answered, those that wait for a number before theirs included.",
            [(total(f"{T}_calls_pending"), "calls")],
        ),
        Panel(
            "Bytes waiting",
            "Data of the calls that wait.",
            [(total(f"{T}_queued_bytes"), "bytes")],
            "bytes",
        ),
        Panel(
            "Models",
            "All, on disk until they are called, on their way to the ranks, and lost.",
            [
                (total(f"{T}_models"), "all"),
                (total(f"{T}_models_suspended"), "suspended"),
                (total(f"{T}_models_recovering"), "recovering"),
                (total(f"{T}_models_lost"), "lost"),
            ],
        ),
        Panel(
            "How long calls take",
            "From arrival to answer, waiting for turns and ranks included.",
            quantiles(
                "grpc_server_handling_seconds",
                *('server="training"', 'grpc_method=~"ForwardBackward|Forward|OptimStep"'),
                by="grpc_method",
            ),
            "s",
        ),
        Panel(
            "Sampler against trainer",
            "Of sampled tokens: how far their logprobs are from those they were sampled with, and "
            "the divergence. In the first call after a save it is arithmetic alone.",
            [
                (
                    f"{rate(f'{T}_mismatch_nats_sum')} / {rate(f'{T}_mismatch_nats_count')}",
                    "mean, nats",
                ),
                (
                    f"{rate(f'{T}_mismatch_kl_nats_total')} / {rate(f'{T}_mismatch_nats_count')}",
                    "KL, nats",
                ),
            ],
        ),
    ],
)
RANKS = Row(
    "Ranks",
    [
        Panel(
            "Signs of life",
            "Since the group last said anything; it does so every 2 s and is replaced after "
            "rank_lease_s.",
            [(most(f"{T}_rank_silence_seconds"), "silence")],
            "s",
        ),
        Panel(
            "Command under way",
            "Since the ranks were given the oldest command that they have not finished.",
            [(most(f"{T}_rank_command_seconds"), "command")],
            "s",
        ),
        Panel(
            "Rank groups attached, models brought back",
            "In the last hour. Each restart of the ranks brings back the models that are called.",
            [
                (f"sum(increase({of(f'{T}_rank_groups_attached_total')}[1h]))", "groups"),
                (f"sum(increase({of(f'{T}_models_restored_total')}[1h]))", "models back"),
                (f"sum(increase({of(f'{T}_models_suspensions_total')}[1h]))", "suspended"),
            ],
        ),
        Panel(
            "Host memory of ranks",
            "Resident, as each rank says.",
            [(most(f"{T}_rank_resident_bytes", by="rank"), "rank {{rank}}")],
            "bytes",
            width=12,
        ),
        Panel(
            "GPU memory of ranks",
            "Share of its GPU's memory that torch has taken, as each rank says; nothing on CPUs.",
            [
                (
                    f"max by (rank) ({of(f'{T}_rank_device_bytes')}"
                    f" / {of(f'{T}_rank_device_size_bytes')})",
                    "rank {{rank}}",
                )
            ],
            "percentunit",
            width=12,
        ),
    ],
)
DURABILITY = Row(
    "Durability",
    [
        Panel(
            "How long a commit of the journal takes",
            "Until it is on disk. Every call waits for one; several share one.",
            quantiles(f"{T}_journal_commit_seconds"),
            "s",
        ),
        Panel(
            "Commits per second",
            "Of the journal.",
            [(rate(f"{T}_journal_commit_seconds_count"), "commits")],
        ),
        Panel(
            "Journal",
            "Bytes on disk. What snapshots make needless is dropped and used again.",
            [(total(f"{T}_journal_bytes"), "journal")],
            "bytes",
        ),
        Panel(
            "Journal writable, not fenced",
            "0 while it cannot be written, or once another Training server has it.",
            [
                (f"min({of(f'{T}_journal_writable')})", "writable"),
                (f"1 - max({of(f'{T}_journal_fenced')})", "not fenced"),
            ],
        ),
        Panel(
            "Snapshots per hour",
            "Taken, failed, and found damaged.",
            [
                (f"sum(increase({of(f'{T}_snapshots_total')}[1h]))", "taken"),
                (f"sum(increase({of(f'{T}_snapshots_failed_total')}[1h]))", "failed"),
                (f"sum(increase({of(f'{T}_snapshots_damaged_total')}[1h]))", "damaged"),
            ],
        ),
        Panel(
            "Oldest step without a snapshot",
            "What would be computed again is at least as old.",
            [(most(f"{T}_snapshot_age_seconds"), "age")],
            "s",
        ),
        Panel(
            "Disk left",
            "Share of the disks of journal and checkpoints that is free.",
            [
                (
                    f"min by (server) ({of('tinsmith_disk_free_bytes')}"
                    f" / {of('tinsmith_disk_size_bytes')})",
                    "{{server}}",
                )
            ],
            "percentunit",
            width=12,
        ),
        Panel(
            "Starts of Training",
            "Processes that had this journal so far.",
            [(most(f"{T}_epoch"), "epoch")],
            width=12,
        ),
    ],
)
