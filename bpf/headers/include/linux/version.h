/* PODSPAN_KERNEL_VERSION comes from agent/kernel/program.py. */
#define KERNEL_VERSION(a, b, c) (((a) << 16) + ((b) << 8) + (c))
#define LINUX_VERSION_CODE PODSPAN_KERNEL_VERSION
