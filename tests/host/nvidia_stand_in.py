"""Stand-ins for the libraries of NVIDIA's driver, for hosts without one: two GPUs, one of which tells no memory."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

FAKE_NVML = """
#include <stdlib.h>
#include <string.h>
typedef struct { char legacy[16]; unsigned domain, bus, device, id, subsystem; char address[32]; } Pci;
typedef struct { unsigned long long total, free, used; } Memory;
typedef struct { unsigned gpu, memory; } Rates;
typedef struct { unsigned pid; unsigned long long used; unsigned instance, part; } Process;
int nvmlInitWithFlags(unsigned flags) { return 0; }
int nvmlInit_v2(void) { return 0; }
int nvmlDeviceGetCount_v2(unsigned *count) { *count = 2; return 0; }
int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **device) { *device = (void *)(long)(index + 1); return 0; }
int nvmlDeviceGetPciInfo_v3(void *device, Pci *pci) {
    memset(pci, 0, sizeof *pci);
    strcpy(pci->address, device == (void *)1 ? "00000000:41:00.0" : "00000000:C1:00.0");
    return 0;
}
int nvmlDeviceGetUUID(void *device, char *uuid, unsigned length) { strcpy(uuid, "GPU-11111111-2222"); return 0; }
int nvmlDeviceGetName(void *device, char *name, unsigned length) { strcpy(name, "NVIDIA A100-SXM4-40GB"); return 0; }
int nvmlDeviceGetMemoryInfo(void *device, Memory *memory) {
    if (device == (void *)2) return 3;
    memory->total = 42949672960ULL; memory->free = 42000000000ULL; memory->used = 949672960ULL;
    return 0;
}
int nvmlDeviceGetTemperature(void *device, int sensor, unsigned *temperature) { *temperature = 41; return 0; }
int nvmlDeviceGetTemperatureV(void *device, unsigned *told) { told[2] = 41; return 0; }
int nvmlDeviceGetUtilizationRates(void *device, Rates *rates) { rates->gpu = 7; rates->memory = 1; return 0; }
static unsigned pid_of(const char *variable, unsigned pid) {
    return getenv(variable) ? (unsigned)atoi(getenv(variable)) : pid;
}
static int processes(void *device, unsigned *count, Process *found, unsigned other, unsigned long long used) {
    if (*count < 2) { *count = 2; return 7; }
    *count = 2;
    found[0].pid = pid_of("TOLD", 4711); found[0].used = device == (void *)1 ? 1000 : 500;
    found[1].pid = other; found[1].used = used;
    return 0;
}
int nvmlDeviceGetComputeRunningProcesses_v3(void *device, unsigned *count, Process *found) {
    return processes(device, count, found, pid_of("UNTOLD", 4713), -1ULL);
}
int nvmlDeviceGetGraphicsRunningProcesses_v3(void *device, unsigned *count, Process *found) {
    return processes(device, count, found, 4712, 0);
}
const char *nvmlErrorString(int status) { return status == 3 ? "Not Supported" : "failed"; }
"""
"""The management library with two GPUs: the calls and their structures are those of nvml.h.

Process 4711 (or ``$TOLD``) computes and draws on both, with 1000 and 500 bytes. How many 4713 (or ``$UNTOLD``) has, it
does not say (NVML_VALUE_NOT_AVAILABLE), and 4712 has none.
"""
FAKE_CUDA = """
#include <stdio.h>
int cuInit(unsigned flags) { return 0; }
int cuDeviceGetCount(int *count) { *count = 2; return 0; }
int cuDeviceGet(int *device, int ordinal) { *device = ordinal; return 0; }
int cuDeviceGetPCIBusId(char *address, int length, int device) {
    snprintf(address, length, "0000:%s:00.0", device ? "41" : "C1");
    return 0;
}
"""


def make_libraries(folder: Path) -> tuple[Path, Path]:
    """Make both libraries in a folder; skips the test where there is no compiler."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("there is no compiler for a stand-in of NVIDIA's libraries")
    made = folder / "libnvidia-ml.so.1", folder / "libcuda.so.1"
    for library, source in zip(made, (FAKE_NVML, FAKE_CUDA), strict=True):
        code = library.with_suffix(".c")
        code.write_text(source)
        subprocess.run([compiler, "-shared", "-fPIC", "-o", str(library), str(code)], check=True, timeout=60)
    return made
