#include "interrupts.h"

#if defined(__unix__) || defined(__APPLE__)
#include <dlfcn.h>
#include <pthread.h>
#include <unistd.h>

#include <chrono>
#if defined(__linux__)
#include <sys/syscall.h>
#endif

namespace synpo {
namespace {

bool is_main_thread() {
#if defined(__linux__)
  return syscall(SYS_gettid) == getpid();
#elif defined(__APPLE__)
  return pthread_main_np() != 0;
#else
  return false;
#endif
}

// CPython's stable ABI, found in the running process: the library links to no Python.
struct Python {
  int (*ensure)() = find<int (*)()>("PyGILState_Ensure");
  void (*release)(int) = find<void (*)(int)>("PyGILState_Release");
  int (*is_initialized)() = find<int (*)()>("Py_IsInitialized");
  int (*check_signals)() = find<int (*)()>("PyErr_CheckSignals");
  void (*fetch)(void**, void**, void**) = find<void (*)(void**, void**, void**)>("PyErr_Fetch");
  void (*restore)(void*, void*, void*) = find<void (*)(void*, void*, void*)>("PyErr_Restore");
  int (*add_pending_call)(int (*)(void*), void*) = find<int (*)(int (*)(void*), void*)>("Py_AddPendingCall");

  bool here() const {
    return ensure && release && is_initialized && check_signals && fetch && restore && add_pending_call &&
           is_initialized();
  }
  template <class Function>
  static Function find(const char* name) {
    return reinterpret_cast<Function>(dlsym(RTLD_DEFAULT, name));
  }
};

const Python& python() {
  static const Python found;
  return found;
}

// What a handler raised, until the interpreter raises it. Touched on the main thread alone.
struct Raised {
  void *type = nullptr, *value = nullptr, *traceback = nullptr;
  bool handed_over = false;
} raised;

int raise_again(void*) {
  python().restore(raised.type, raised.value, raised.traceback);
  raised = {};
  return -1;
}

}  // namespace

bool interrupted() {
  static thread_local const bool on_main_thread = is_main_thread();
  if (!on_main_thread) return false;
  if (raised.handed_over) return true;
  // Another Python thread may keep the lock for 5 ms: five looks a second cost little even then.
  using Clock = std::chrono::steady_clock;
  static Clock::time_point next_look;
  if (Clock::now() < next_look) return false;
  next_look = Clock::now() + std::chrono::milliseconds(200);
  if (!python().here()) return false;

  const int state = python().ensure();
  if (!raised.type && python().check_signals()) python().fetch(&raised.type, &raised.value, &raised.traceback);
  // An op cannot raise Python's exception across PyTorch's ABI; a pending call can, at the interpreter's next step.
  // A full queue (of 32) is tried again at the next look.
  if (raised.type) raised.handed_over = python().add_pending_call(raise_again, nullptr) == 0;
  python().release(state);
  return raised.handed_over;
}

}  // namespace synpo
#else
namespace synpo {
bool interrupted() { return false; }
}  // namespace synpo
#endif
