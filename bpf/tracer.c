/* tracer: all that the agent attaches to the kernel, as one object that shares its maps.
 *
 * Settings come as defines: agent/kernel/program.py.
 */
#include "exchange.h"
#include "kernel.h"
#include "losses.h"
#include "scanner.h"
#include "b3.h"
#include "handoff.h"
#include "connection.h"
#include "context.h"
#include "tcp.h"
#include "message.h"
#include "lifecycle.c"
#include "failure.c"
#include "request.c"
#include "bytes.c"
