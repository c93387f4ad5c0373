/*
 * The part of Ascend's ACL runtime that torch_npu needs, over host memory.
 *
 * torch_npu binds these symbols when it is loaded (BIND_NOW: every one must exist, called or not) or looks
 * them up by name later. "Device" memory is ordinary host memory, streams run nothing (the Python side runs
 * every operator at once, in order), and a few functions keep books that tests read: how often the host
 * waited, and whether a graph is being captured.
 *
 * Signatures are those of the public ACL API; 0 is success everywhere.
 */
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define API __attribute__((visibility("default")))
enum { OK = 0, NOT_SUPPORTED = 207000, WAIT_DURING_CAPTURE = 107027, CAPTURE_BROKEN = 107025, OUT_OF_MEMORY = 207001 };

/* --- books the Python side reads ------------------------------------------------------------------------ */

static int64_t host_waits;
static void *capturing_stream, *capturing_graph;
static int capture_broken;
static const char *last_error = "";

API int64_t emulated_host_waits(void) { return host_waits; }

/* A wait while a graph records would block on work that is only written down, so the runtime refuses it. */
static int wait_for_device(void) {
    if (capturing_graph) {
        last_error = "the host waits for the device while a graph is being captured";
        return WAIT_DURING_CAPTURE;
    }
    host_waits++;
    return OK;
}

API const char *aclGetRecentErrMsg(void) {  /* torch_npu prints it: NULL would crash the message */
    const char *message = last_error;
    last_error = "";
    return message;
}

/* --- memory: real, because everything else stands on it ------------------------------------------------- */

/* 512 bytes is the alignment torch_npu's caching allocator assumes of the device. */
static int allocate(void **pointer, size_t size) {
    size_t rounded = (size + 511) / 512 * 512;
    *pointer = aligned_alloc(512, rounded ? rounded : 512);
    return *pointer ? OK : OUT_OF_MEMORY;
}
API int aclrtMalloc(void **pointer, size_t size, int policy) { return allocate(pointer, size); }
API int aclrtMallocAlign32(void **pointer, size_t size, int policy) { return allocate(pointer, size); }
API int aclrtMallocHost(void **pointer, size_t size) { return allocate(pointer, size); }
API int aclrtFree(void *pointer) { free(pointer); return OK; }
API int aclrtFreeHost(void *pointer) { free(pointer); return OK; }

API int aclrtMemcpy(void *to, size_t room, const void *from, size_t count, int kind) {
    if (capturing_graph) return wait_for_device();  /* the blocking copy cannot be recorded */
    if (count > room) return NOT_SUPPORTED;
    memmove(to, from, count);
    return OK;
}
API int aclrtMemcpyAsync(void *to, size_t room, const void *from, size_t count, int kind, void *stream) {
    if (count > room) return NOT_SUPPORTED;
    memmove(to, from, count);
    return OK;
}
API int aclrtMemset(void *to, size_t room, int32_t value, size_t count) {
    if (count > room) return NOT_SUPPORTED;
    memset(to, value, count);
    return OK;
}
/* 64 GiB is one Atlas A2 card; nothing here depends on the figure. */
API int aclrtGetMemInfo(int attribute, size_t *available, size_t *total) {
    *available = *total = (size_t)64 << 30;
    return OK;
}

/* --- one device ------------------------------------------------------------------------------------------ */

API int aclrtGetDeviceCount(uint32_t *count) { *count = 1; return OK; }
API int aclrtGetDevice(int32_t *device) { *device = 0; return OK; }
API int aclrtDeviceCanAccessPeer(int32_t *can, int32_t device, int32_t peer) { *can = 0; return OK; }
API int aclrtDeviceGetBareTgid(int32_t *process) { *process = 1; return OK; }
API int aclGetDeviceCapability(uint32_t device, int what, int64_t *value) { *value = 24; return OK; }
API int aclrtGetSysParamOpt(int option, int64_t *value) { *value = 0; return OK; }

/* torch_npu turns the name into a table index once, at its start, so it is chosen before the process. */
API const char *aclrtGetSocName(void) {
    const char *chosen = getenv("QUASAR_ASCEND_SOC");
    return chosen && *chosen ? chosen : "Ascend910B2";
}

/* torch_npu treats a null context as "device not initialised", hence an address that is merely not null. */
static int context_mark;
API int aclrtGetCurrentContext(void **context) { *context = &context_mark; return OK; }
API int aclrtGetPrimaryCtxState(int32_t device, uint32_t *flags, int32_t *active) { *active = 1; return OK; }

/* --- streams and events ---------------------------------------------------------------------------------- */

/* Streams are compared by address, so each needs its own; they are few and live as long as the process. */
static int new_stream(void **stream) { *stream = malloc(1); return *stream ? OK : OUT_OF_MEMORY; }
API int aclrtCreateStream(void **stream) { return new_stream(stream); }
API int aclrtCreateStreamWithConfig(void **stream, uint32_t priority, uint32_t flags) { return new_stream(stream); }
API int aclrtDestroyStream(void *stream) { free(stream); return OK; }
API int aclrtDestroyStreamForce(void *stream) { free(stream); return OK; }
API int aclrtStreamQuery(void *stream, int *status) { *status = 0; return OK; }  /* 0: all work is done */

API int aclrtSynchronizeStream(void *stream) { return wait_for_device(); }
API int aclrtSynchronizeStreamWithTimeout(void *stream, int32_t ms) { return wait_for_device(); }
API int aclrtSynchronizeDevice(void) { return wait_for_device(); }
API int aclrtSynchronizeDeviceWithTimeout(int32_t ms) { return wait_for_device(); }
API int aclrtSynchronizeEvent(void *event) { return wait_for_device(); }
API int aclrtSynchronizeEventWithTimeout(void *event, int32_t ms) { return wait_for_device(); }

/* An event remembers the host clock, so that timing code gets finite, ordered numbers. */
static int new_event(void **event) {
    *event = calloc(1, sizeof(struct timespec));
    return *event ? OK : OUT_OF_MEMORY;
}
API int aclrtCreateEventWithFlag(void **event, uint32_t flag) { return new_event(event); }
API int aclrtCreateEventExWithFlag(void **event, uint32_t flag) { return new_event(event); }
API int aclrtDestroyEvent(void *event) { free(event); return OK; }
API int aclrtRecordEvent(void *event, void *stream) { return clock_gettime(CLOCK_MONOTONIC, event); }
API int aclrtEventElapsedTime(float *milliseconds, void *start, void *end) {
    struct timespec *a = start, *b = end;
    *milliseconds = (float)((b->tv_sec - a->tv_sec) * 1e3 + (b->tv_nsec - a->tv_nsec) / 1e6);
    return OK;
}
API int aclrtQueryEventStatus(void *event, int *status) { *status = 1; return OK; }      /* 1: recorded, complete */
API int aclrtQueryEventWaitStatus(void *event, int *status) { *status = 0; return OK; }  /* 0: complete */

/* --- graphs: the runtime only keeps the state torch_npu asks for; recording and replay are Python's ------ */

API int aclmdlRICaptureBegin(void *stream, int mode) {
    if (capturing_graph) return NOT_SUPPORTED;
    capturing_stream = stream;
    return new_stream(&capturing_graph);  /* a graph too is just an address of its own */
}
API int aclmdlRICaptureGetInfo(void *stream, int *status, void **graph) {
    int active = capturing_graph && stream == capturing_stream;
    *status = active;  /* 0: none, 1: active */
    if (graph) *graph = active ? capturing_graph : NULL;
    return OK;
}
/* After an operator that cannot be captured, the capture is broken: ending it is an error. */
API void emulated_break_capture(void) { capture_broken = 1; }
API int aclmdlRICaptureEnd(void *stream, void **graph) {
    int broken = capture_broken;
    *graph = broken ? NULL : capturing_graph;
    capturing_stream = capturing_graph = NULL;
    capture_broken = 0;
    if (broken) last_error = "the capture was broken by an operator that cannot be captured";
    return broken ? CAPTURE_BROKEN : OK;
}
API int aclmdlRIExecuteAsync(void *graph, void *stream) { return OK; }
API int aclmdlRIDestroy(void *graph) { free(graph); return OK; }
API int aclmdlRICaptureTaskGrpBegin(void *stream) { return OK; }
API int aclmdlRICaptureTaskGrpEnd(void *stream, void **group) { return new_stream(group); }
API int aclmdlRICaptureTaskUpdateBegin(void *stream, void *group) { return OK; }
API int aclmdlRICaptureTaskUpdateEnd(void *stream) { return OK; }

/* --- accepted and ignored: set-up, tear-down, ordering between streams that hold nothing ----------------- */

#define IGNORED(name) API int name(void) { return OK; }
IGNORED(aclInit) IGNORED(aclFinalize) IGNORED(aclAppLog)
IGNORED(aclSetCompileopt) IGNORED(aclrtCtxSetSysParamOpt) IGNORED(aclrtSetDeviceSatMode) IGNORED(aclrtSetStreamOverflowSwitch)
 IGNORED(aclrtSetOpExecuteTimeOut)
IGNORED(aclrtSetDevice) IGNORED(aclrtResetDevice) IGNORED(aclrtSetCurrentContext)
IGNORED(aclrtStreamWaitEvent) IGNORED(aclrtResetEvent) IGNORED(aclrtProcessReport)
IGNORED(aclmdlInitDump) IGNORED(aclmdlSetDump) IGNORED(aclmdlFinalizeDump)
IGNORED(MsprofRegisterCallback) IGNORED(MsprofReportAdditionalInfo) IGNORED(MsprofReportApi)
IGNORED(MsprofReportCompactInfo) IGNORED(MsprofGetHashId) IGNORED(MsprofSysCycleTime)

/* --- refused: bound at load time, and a call means that an operator slipped past the emulation ----------- */

#define REFUSED(name) API int name(void) { last_error = #name " is not emulated"; return NOT_SUPPORTED; }
REFUSED(aclopCompileAndExecute) REFUSED(aclrtBinaryGetFunction) REFUSED(aclrtBinaryLoadFromData)
REFUSED(aclrtGetFunctionAddr) REFUSED(aclrtDeviceEnablePeerAccess) REFUSED(aclrtMemExportToShareableHandle)
REFUSED(aclrtMemImportFromShareableHandle) REFUSED(aclrtMemSetPidToShareableHandle)
REFUSED(aclrtMallocPhysical) REFUSED(aclrtFreePhysical) REFUSED(aclrtReserveMemAddress)
REFUSED(aclrtReleaseMemAddress) REFUSED(aclrtMapMem) REFUSED(aclrtUnmapMem)
REFUSED(rtDevBinaryRegister) REFUSED(rtFunctionRegister) REFUSED(rtGetC2cCtrlAddr) REFUSED(rtKernelLaunch)
REFUSED(aclCreateDataBuffer) REFUSED(aclDestroyDataBuffer) REFUSED(aclCreateTensorDesc)
REFUSED(aclDestroyTensorDesc) REFUSED(aclGetTensorDescDimV2) REFUSED(aclGetTensorDescFormat)
REFUSED(aclGetTensorDescNumDims) REFUSED(aclGetTensorDescType) REFUSED(aclSetTensorDescName)
REFUSED(aclSetTensorFormat) REFUSED(aclSetTensorPlaceMent) REFUSED(aclSetTensorShape)
REFUSED(aclopCreateAttr) REFUSED(aclopDestroyAttr) REFUSED(aclopSetAttrBool) REFUSED(aclopSetAttrDataType)
REFUSED(aclopSetAttrFloat) REFUSED(aclopSetAttrInt) REFUSED(aclopSetAttrListBool)
REFUSED(aclopSetAttrListFloat) REFUSED(aclopSetAttrListInt) REFUSED(aclopSetAttrListListInt)
REFUSED(aclopSetAttrString)
