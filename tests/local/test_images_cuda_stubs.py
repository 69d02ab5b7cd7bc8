"""The stand-ins for NVIDIA's libraries in the CPU image: which are made, and what they export.

Proved here, on lines as `readelf --wide` prints them: only NVIDIA's libraries are replaced and never the
driver's libcuda; each function goes to the library that its version or prefix names; PyTorch's own and the
system's symbols are in none; the C text has one function for each. That PyTorch loads with them is proved by
the image's own build, which runs a model.
"""

from __future__ import annotations

import importlib.util
from types import ModuleType

import pytest

from paths import ROOT

DYNAMIC = """
 0x0000000000000001 (NEEDED)             Shared library: [libc10_cuda.so]
 0x0000000000000001 (NEEDED)             Shared library: [libcudart.so.13]
 0x0000000000000001 (NEEDED)             Shared library: [libcusparseLt.so.0]
 0x0000000000000001 (NEEDED)             Shared library: [libnccl.so.2]
 0x0000000000000001 (NEEDED)             Shared library: [libnvshmem_host.so.3]
 0x0000000000000001 (NEEDED)             Shared library: [libcuda.so.1]
 0x0000000000000001 (NEEDED)             Shared library: [libc.so.6]
 0x000000000000000f (RPATH)              Library rpath: [$ORIGIN/../../nvidia/cu13/lib:$ORIGIN]
"""
VERSIONS = """
  0x0060: Version: 1  File: libcudart.so.13  Cnt: 1
  0x0070:   Name: libcudart.so.13  Flags: none  Version: 14
  0x0080: Version: 1  File: libc.so.6  Cnt: 1
  0x0090:   Name: GLIBC_2.14  Flags: none  Version: 33
  0x0100: Version: 1  File: libnvshmem_host.so.3  Cnt: 1
  0x0110:   Name: NVSHMEM  Flags: none  Version: 2
"""
SYMBOLS = """
     7: 0000000000000000     0 FUNC    GLOBAL DEFAULT  UND cudaGetDeviceCount@libcudart.so.13 (14)
     8: 0000000000000000     0 FUNC    GLOBAL DEFAULT  UND memcpy@GLIBC_2.14 (33)
     9: 0000000000000000     0 FUNC    GLOBAL DEFAULT  UND ncclGetErrorString
    10: 0000000000000000     0 FUNC    GLOBAL DEFAULT  UND cusparseLtInit
    11: 0000000000000000     0 FUNC    GLOBAL DEFAULT  UND nvshmem_init@NVSHMEM (2)
    12: 0000000000000000     0 FUNC    GLOBAL DEFAULT  UND _ZN3c104cuda12device_countEv
    13: 0000000000001000    16 FUNC    GLOBAL DEFAULT   12 cudaDefinedHere
"""
LIBRARIES = {"libcudart.so.13", "libcusparseLt.so.0", "libnccl.so.2", "libnvshmem_host.so.3"}


@pytest.fixture(scope="module")
def stubs() -> ModuleType:
    """The script, which lies in an image's build context and so in no package."""
    path = ROOT / "k8s/local/vllm-cpu/cuda_stubs.py"
    spec = importlib.util.spec_from_file_location("cuda_stubs", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_only_nvidias_libraries_are_replaced_and_not_the_drivers(stubs: ModuleType) -> None:
    assert stubs.missing_libraries(DYNAMIC) == LIBRARIES


def test_versions_are_those_of_the_replaced_libraries(stubs: ModuleType) -> None:
    found = stubs.symbol_versions(VERSIONS, LIBRARIES)
    assert found == {"libcudart.so.13": "libcudart.so.13", "NVSHMEM": "libnvshmem_host.so.3"}


def test_each_function_goes_where_its_version_or_prefix_says(stubs: ModuleType) -> None:
    versions = stubs.symbol_versions(VERSIONS, LIBRARIES)
    assert stubs.wanted_functions(SYMBOLS, LIBRARIES, versions) == {
        "libcudart.so.13": {"cudaGetDeviceCount"},
        "libcusparseLt.so.0": {"cusparseLtInit"},
        "libnccl.so.2": {"ncclGetErrorString"},
        "libnvshmem_host.so.3": {"nvshmem_init"},
    }


def test_a_function_reports_no_device_and_one_that_returns_text_returns_text(stubs: ModuleType) -> None:
    text = stubs.source({"cudaGetDeviceCount", "ncclGetErrorString"})
    assert text.splitlines() == [
        "long cudaGetDeviceCount(void) { return 100; }",
        'const char *ncclGetErrorString(void) { return "no CUDA device: CPU image"; }',
    ]
