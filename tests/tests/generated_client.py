"""Steers a VM with the client that openapi-python-client has generated.

Arguments: the API socket of a VMM without a VM, and a kernel that never ends.
"""

import sys

import httpx
from generated import Client
from generated.api.default import (
    boot_vm,
    counters_vm,
    create_vm,
    delete_vm,
    info_vm,
    ping_vmm,
    reclaim_stats_vm,
    resize_vm,
    shutdown_vmm,
)
from generated.models import (
    BalloonConfig,
    ConsoleConfig,
    ConsoleMode,
    MemoryConfig,
    PayloadConfig,
    ReclaimStats,
    SerialConfig,
    VmConfig,
    VmResize,
    VmState,
)

RAM_BYTES = 256 << 20


def life(client, kernel):
    assert ping_vmm.sync(client=client).version

    config = VmConfig(
        payload=PayloadConfig(kernel=kernel, cmdline="scenario=spin"),
        memory=MemoryConfig(size=RAM_BYTES),
        balloon=BalloonConfig(size=0, free_page_reporting=True),
        serial=SerialConfig(mode=ConsoleMode.NULL),
        console=ConsoleConfig(mode=ConsoleMode.OFF),
    )
    expect(204, create_vm.sync_detailed(client=client, body=config))
    info = info_vm.sync(client=client)
    assert info.state == VmState.CREATED, info
    assert info.config.payload.kernel == kernel, info
    failed = reclaim_stats_vm.sync_detailed(client=client)
    expect(500, failed)
    assert failed.parsed and all(isinstance(text, str) for text in failed.parsed), failed

    expect(204, boot_vm.sync_detailed(client=client))
    info = info_vm.sync(client=client)
    assert info.state == VmState.RUNNING, info
    assert info.memory_actual_size == RAM_BYTES, info
    stats = reclaim_stats_vm.sync(client=client)
    assert isinstance(stats, ReclaimStats), stats
    assert stats.configured_bytes == RAM_BYTES, stats
    assert 0 < stats.resident_bytes < RAM_BYTES, stats
    assert "__balloon" in counters_vm.sync(client=client), "no counters of the balloon"
    resize = VmResize(desired_balloon=64 << 20)
    expect(204, resize_vm.sync_detailed(client=client, body=resize))
    expect(204, delete_vm.sync_detailed(client=client))
    expect(200, shutdown_vmm.sync_detailed(client=client))


def expect(status, response):
    assert response.status_code == status, (response.status_code, response.content)


def main():
    socket, kernel = sys.argv[1:]
    transport = httpx.HTTPTransport(uds=socket)
    client = Client(
        base_url="http://localhost/api/v1",
        raise_on_unexpected_status=True,
        httpx_args={"transport": transport},
    )
    with client:
        life(client, kernel)


main()
