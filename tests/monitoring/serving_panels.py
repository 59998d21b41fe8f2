"""Rows of the dashboard: sampling, checkpoints, the gateway, calls, tenants and processes."""

from monitoring.panel import TENANTS, Panel, Row, of, quantiles, rate, total

S, C, G = "tinsmith_sampler", "tinsmith_checkpoint", "tinsmith_gateway"
OURS = 'job="tinsmith"'

SAMPLER = Row(
    "Sampler",
    [
        Panel(
            "Tokens per second",
            "Drawn, read of prompts (prefill), and found in the prefix cache.",
            [
                (rate(f"{S}_sampled_tokens_total"), "sampled"),
                (rate(f"{S}_prompt_tokens_computed_total"), "prefilled"),
                (rate(f"{S}_prompt_tokens_cached_total"), "cached"),
            ],
        ),
        Panel(
            "Requests",
            "Computed, waiting for a place or for their adapter, and the places there are.",
            [
                (total(f"{S}_requests_running"), "running"),
                (total(f"{S}_requests_waiting"), "waiting"),
                (total(f"{S}_requests_fetching"), "fetching"),
                (total(f"{S}_requests_running_max"), "places"),
            ],
        ),
        Panel(
            "Share of the queue",
            "Requests that wait, of those that may: at 1 they are refused.",
            [
                (
                    f"max by (instance) ({of(f'{S}_requests_waiting')}"
                    f" / {of(f'{S}_requests_waiting_max')})",
                    "{{instance}}",
                )
            ],
            "percentunit",
        ),
        Panel(
            "Time to the first token",
            "From a request's admission: waiting, its adapter and its prompt included.",
            quantiles(f"{S}_first_token_seconds"),
            "s",
        ),
        Panel(
            "Keys and values",
            "Share of the room for them that is taken or promised.",
            [
                (
                    f"max by (instance) ({of(f'{S}_kv_tokens')} / {of(f'{S}_kv_tokens_max')})",
                    "{{instance}}",
                )
            ],
            "percentunit",
        ),
        Panel(
            "Prefix cache",
            "Share of prompts' tokens that need not be read.",
            [
                (
                    f"{rate(f'{S}_prompt_tokens_cached_total')}"
                    f" / ({rate(f'{S}_prompt_tokens_cached_total')}"
                    f" + {rate(f'{S}_prompt_tokens_computed_total')})",
                    "cached",
                )
            ],
            "percentunit",
        ),
        Panel(
            "Adapters",
            "Share of their room, by bytes and by number.",
            [
                (
                    f"max by (instance) ({of(f'{S}_adapters_bytes')}"
                    f" / {of(f'{S}_adapters_bytes_max')})",
                    "{{instance}} bytes",
                ),
                (
                    f"max by (instance) ({of(f'{S}_adapters')} / {of(f'{S}_adapters_max')})",
                    "{{instance}} number",
                ),
            ],
            "percentunit",
        ),
        Panel(
            "Adapters brought ahead per hour",
            "Before a call asked for them, and those of them that a call asked for.",
            [
                (f"sum(increase({of(f'{S}_adapters_ahead_total')}[1h]))", "ahead"),
                (f"sum(increase({of(f'{S}_adapters_ahead_used_total')}[1h]))", "used"),
            ],
        ),
        Panel(
            "Batch",
            "Rows of a forward in the mean; sequences now, and the most; who waits inside.",
            [
                (f"{rate(f'{S}_step_rows_total')} / {rate(f'{S}_steps_total')}", "mean rows"),
                (total(f"{S}_sequences"), "sequences"),
                (total(f"{S}_sequences_max"), "may be"),
                (total(f"{S}_engine_waiting"), "waits in the engine"),
            ],
        ),
    ],
)
CHECKPOINT = Row(
    "Checkpoint",
    [
        Panel(
            "Checkpoints",
            "That there are, by kind.",
            [(total(f"{C}_checkpoints", by="kind"), "{{kind}}")],
        ),
        Panel(
            "Bytes being written",
            "Of checkpoints that are not complete, and the room for them.",
            [
                (total(f"{C}_staged_bytes"), "staged"),
                (total(f"{C}_staged_bytes_max"), "room"),
            ],
            "bytes",
        ),
        Panel(
            "Sweeps that failed per hour",
            "What expired could not be removed.",
            [(f"sum(increase({of(f'{C}_sweeps_failed_total')}[1h]))", "failed")],
        ),
    ],
)
GATEWAY = Row(
    "Gateway",
    [
        Panel(
            "Requests per second",
            "By HTTP status; 408 is a long poll that found no result yet.",
            [(rate(f"{G}_requests_total", by="status"), "{{status}}")],
        ),
        Panel(
            "How long requests take",
            "Long polls wait on purpose.",
            quantiles(f"{G}_request_seconds"),
            "s",
        ),
        Panel(
            "In hand",
            "Requests under way, futures whose result is not there yet, and sessions.",
            [
                (total(f"{G}_requests_running"), "requests"),
                (total(f"{G}_results_under_way"), "futures"),
                (total(f"{G}_sessions"), "sessions"),
            ],
        ),
        Panel(
            "Share of failures",
            "Requests that were answered 5xx.",
            [(f"{rate(f'{G}_failures_total')} / {rate(f'{G}_requests_total')}", "5xx")],
            "percentunit",
        ),
        Panel(
            "Share of what may be in hand",
            "At 1 requests are refused.",
            [
                (
                    f"max({of(f'{G}_requests_running')} / {of(f'{G}_requests_running_max')})",
                    "requests",
                ),
                (
                    f"max({of(f'{G}_results_under_way')} / {of(f'{G}_results_under_way_max')})",
                    "futures",
                ),
            ],
            "percentunit",
        ),
        Panel(
            "Results kept",
            "For those who ask again.",
            [(total(f"{G}_results_kept_bytes"), "results")],
            "bytes",
        ),
    ],
)
CALLS = Row(
    "Calls",
    [
        Panel(
            "Calls per second",
            "Of the gRPC servers.",
            [(rate("grpc_server_started_total", OURS, by="server"), "{{server}}")],
        ),
        Panel(
            "Answers per second that are no OK",
            "By code.",
            [
                (
                    rate("grpc_server_handled_total", OURS, 'grpc_code!="OK"', by="grpc_code"),
                    "{{grpc_code}}",
                )
            ],
        ),
        Panel(
            "Faults per hour",
            "Internal, Unknown and DataLoss, by method.",
            [
                (
                    "sum by (server, grpc_method) (increase("
                    + of(
                        "grpc_server_handled_total",
                        OURS,
                        'grpc_code=~"Internal|Unknown|DataLoss"',
                    )
                    + "[1h]))",
                    "{{server}} {{grpc_method}}",
                )
            ],
        ),
        Panel(
            "Calls refused for their key, per second",
            "Before they are counted as calls; nothing without keys.",
            [(rate("tinsmith_keys_refusals_total", by="server, reason"), "{{server}} {{reason}}")],
            width=12,
        ),
        Panel(
            "Keys",
            "In the file of keys, and whether it can be read; nothing without keys.",
            [
                (f"max by (server) ({of('tinsmith_keys')})", "{{server}} keys"),
                (f"min by (server) ({of('tinsmith_keys_readable')})", "{{server}} readable"),
            ],
            width=12,
        ),
    ],
)
TENANT = Row(
    "Tenants",
    [
        Panel(
            "Trained tokens per second",
            TENANTS,
            [(rate("tinsmith_training_tenant_computed_tokens_total", by="tenant"), "{{tenant}}")],
        ),
        Panel(
            "Sampled tokens per second",
            TENANTS,
            [(rate(f"{S}_tenant_sampled_tokens_total", by="tenant"), "{{tenant}}")],
        ),
        Panel(
            "Prompt tokens per second",
            TENANTS,
            [(rate(f"{S}_tenant_prompt_tokens_total", by="tenant"), "{{tenant}}")],
        ),
        Panel(
            "Calls per second",
            f"Of the gRPC servers. {TENANTS}",
            [(rate("tinsmith_tenant_calls_total", by="tenant"), "{{tenant}}")],
        ),
        Panel(
            "Requests per second",
            f"Of the gateway. {TENANTS}",
            [(rate(f"{G}_tenant_requests_total", by="tenant"), "{{tenant}}")],
        ),
        Panel(
            "Calls waiting",
            f"Of training. {TENANTS}",
            [(total("tinsmith_training_tenant_calls_pending", by="tenant"), "{{tenant}}")],
        ),
        Panel(
            "Models",
            TENANTS,
            [(total("tinsmith_training_tenant_models", by="tenant"), "{{tenant}}")],
            width=12,
        ),
        Panel(
            "Stored bytes",
            f"{TENANTS} What others stored is not added up.",
            [(total(f"{C}_tenant_stored_bytes", by="tenant"), "{{tenant}}")],
            "bytes",
            width=12,
        ),
    ],
)
PROCESSES = Row(
    "Processes",
    [
        Panel(
            "Processor time",
            "Processors that each process uses; ranks are not among them.",
            [(rate("process_cpu_seconds_total", OURS, by="server"), "{{server}}")],
        ),
        Panel(
            "Memory",
            "Resident.",
            [
                (
                    f"max by (server) ({of('process_resident_memory_bytes', OURS)})",
                    "{{server}}",
                )
            ],
            "bytes",
        ),
        Panel(
            "Open files",
            "Share of those that a process may open; connections are files, too.",
            [
                (
                    f"max by (server) ({of('process_open_fds', OURS)}"
                    f" / {of('process_max_fds', OURS)})",
                    "{{server}}",
                )
            ],
            "percentunit",
        ),
        Panel(
            "Up",
            "Whether Prometheus reads it.",
            [(f"min by (server) ({of('up', OURS)})", "{{server}}")],
            width=12,
        ),
        Panel(
            "Age",
            "Since each process started.",
            [
                (
                    f"time() - max by (server) ({of('process_start_time_seconds', OURS)})",
                    "{{server}}",
                )
            ],
            "s",
            width=12,
        ),
    ],
)
