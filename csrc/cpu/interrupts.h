// Ctrl-C inside a long op.
#pragma once

namespace synpo {

// True once a Python signal handler has raised. The op is then to stop and to return whatever it has: nobody will see
// it, since the exception is raised as soon as the interpreter goes on. False on every thread but the main one, where
// Python handles no signals, and without Python. Cheap: it looks five times a second.
bool interrupted();

}  // namespace synpo
