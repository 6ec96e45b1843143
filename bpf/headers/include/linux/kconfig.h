/* What bcc's prelude expects of kernel headers, so that a node needs none.
 *
 * Kernel structs are not declared here: bpf/ reads their fields at offsets taken from
 * the running kernel's BTF (agent/kernel/btf.py). Only what the bpf(2) interface and
 * bcc itself name is left, and that is stable.
 */
#ifndef PODSPAN_KCONFIG_H
#define PODSPAN_KCONFIG_H

#define CONFIG_BPF_SYSCALL 1	/* bcc's prelude hides helpers without it */
#define CONFIG_BPF_KPROBE_OVERRIDE 0

typedef signed char __s8, s8;
typedef unsigned char __u8, u8, u_char;
typedef short __s16, s16;
typedef unsigned short __u16, u16;
typedef int __s32, s32;
typedef unsigned int __u32, u32;
typedef long long __s64, s64;
typedef unsigned long long __u64, u64;
typedef u16 __le16, __be16, __sum16;
typedef u32 __le32, __be32, __wsum;
typedef u64 __le64, __be64;
typedef unsigned long size_t, uintptr_t;
typedef long ssize_t;
typedef int pid_t;
typedef _Bool bool;
#define true 1
#define false 0
#define NULL ((void *)0)
#define __aligned_u64 u64 __attribute__((aligned(8)))
#define __always_inline inline __attribute__((always_inline))
#define barrier() asm volatile("" ::: "memory")

/* Registers at a kprobe; user-visible layout, fixed since 2.6 (asm/ptrace.h). */
#if defined(__x86_64__) || defined(__TARGET_ARCH_x86)
struct pt_regs {
	unsigned long r15, r14, r13, r12, bp, bx, r11, r10, r9, r8;
	unsigned long ax, cx, dx, si, di, orig_ax, ip, cs, flags, sp, ss;
};
#else
struct user_pt_regs {
	u64 regs[31], sp, pc, pstate;
};
struct pt_regs {
	u64 regs[31], sp, pc, pstate;
};
#endif

#endif
