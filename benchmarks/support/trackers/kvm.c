/* KVM's dirty logs: a guest of one vCPU writes what it is told to, and the log of its memory slot tells what that was. */
#define _GNU_SOURCE
#include "trackers.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/kvm.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>

#define PROGRAM_ADDRESS (UINT64_C(3) << 30) /* above all memory that is written */
#define LIST_ADDRESS (PROGRAM_ADDRESS + PAGE_BYTES)
#define RING_PAGE 64
#define PAGES_PER_RUN 32768 /* far less than a ring has entries: where KVM emulates, a ring that is full overflows */

/* In protected mode: ESI points to addresses, ECX counts them. */
static const unsigned char PROGRAM[] = {
    0xad,       /* next: lodsd */
    0xfe, 0x00, /* incb (%eax) */
    0xe2, 0xfb, /* loop next */
    0xf4,       /* hlt */
};

static int vm, vcpu, clears_itself;
static struct kvm_run *run;
static unsigned char *program;
static struct kvm_dirty_gfn *ring;
static uint64_t ring_entries, ring_next;

static void set_slot(uint32_t number, uint32_t flags, uint64_t address, uint64_t size, void *bytes)
{
    struct kvm_userspace_memory_region region = {
        .slot = number,
        .flags = flags,
        .guest_phys_addr = address,
        .memory_size = size,
        .userspace_addr = (uintptr_t)bytes,
    };
    check(ioctl(vm, KVM_SET_USER_MEMORY_REGION, &region) == 0, "KVM_SET_USER_MEMORY_REGION");
}

static void enable(uint32_t capability, uint64_t argument)
{
    struct kvm_enable_cap enabled = {.cap = capability, .args = {argument}};
    check(ioctl(vm, KVM_ENABLE_CAP, &enabled) == 0, "KVM_ENABLE_CAP");
}

static void enter_protected_mode(void)
{
    struct kvm_sregs sregs;
    check(ioctl(vcpu, KVM_GET_SREGS, &sregs) == 0, "KVM_GET_SREGS");
    struct kvm_segment flat = {.limit = 0xffffffff, .selector = 0x10, .type = 3, .present = 1, .db = 1, .s = 1, .g = 1};
    sregs.ds = sregs.es = sregs.fs = sregs.gs = sregs.ss = flat;
    flat.selector = 0x08;
    flat.type = 11;
    sregs.cs = flat;
    sregs.cr0 |= 1;
    check(ioctl(vcpu, KVM_SET_SREGS, &sregs) == 0, "KVM_SET_SREGS");
}

static void make_guest(int kvm)
{
    uint64_t room = PAGE_BYTES + PAGES_PER_RUN * sizeof(uint32_t);
    program = mmap(NULL, room, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
    check(program != MAP_FAILED, "mmap");
    memcpy(program, PROGRAM, sizeof PROGRAM);
    set_slot(0, 0, 0, memory.size, memory.bytes);
    set_slot(1, 0, PROGRAM_ADDRESS, room, program);
    vcpu = ioctl(vm, KVM_CREATE_VCPU, 0);
    check(vcpu >= 0, "KVM_CREATE_VCPU");
    run = mmap(NULL, (size_t)ioctl(kvm, KVM_GET_VCPU_MMAP_SIZE, 0), PROT_READ | PROT_WRITE, MAP_SHARED, vcpu, 0);
    check(run != MAP_FAILED, "mmap of a vCPU");
    enter_protected_mode();
}

static int open_vm(void)
{
    int kvm = open("/dev/kvm", O_RDWR | O_CLOEXEC);
    check(kvm >= 0, "/dev/kvm");
    vm = ioctl(kvm, KVM_CREATE_VM, 0);
    check(vm >= 0, "KVM_CREATE_VM");
    return kvm;
}

static void prepare_log(const char *name, const char *option)
{
    (void)option;
    int kvm = open_vm();
    clears_itself = strcmp(name, "kvm-legacy") == 0;
    if (strcmp(name, "kvm-manual") == 0)
        enable(KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE);
    if (strcmp(name, "kvm-initially-set") == 0)
        enable(KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE | KVM_DIRTY_LOG_INITIALLY_SET);
    make_guest(kvm);
}

static void arm(void)
{
    set_slot(0, KVM_MEM_LOG_DIRTY_PAGES, 0, memory.size, memory.bytes);
}

static void disarm(void)
{
    set_slot(0, 0, 0, memory.size, memory.bytes);
}

static void get_log(void)
{
    struct kvm_dirty_log log = {.slot = 0, .dirty_bitmap = memory.words};
    check(ioctl(vm, KVM_GET_DIRTY_LOG, &log) == 0, "KVM_GET_DIRTY_LOG");
}

static void clear_log(uint64_t first, uint64_t pages)
{
    struct kvm_clear_dirty_log log = {
        .slot = 0,
        .num_pages = (uint32_t)pages,
        .first_page = first,
        .dirty_bitmap = memory.words + first / 64,
    };
    if (!clears_itself)
        check(ioctl(vm, KVM_CLEAR_DIRTY_LOG, &log) == 0, "KVM_CLEAR_DIRTY_LOG");
}

static void clear_nothing(uint64_t first, uint64_t pages)
{
    (void)first, (void)pages;
}

static void prepare_ring(const char *name, const char *option)
{
    (void)name;
    int kvm = open_vm();
    ring_entries = strtoull(option, NULL, 10);
    int acquires = ioctl(vm, KVM_CHECK_EXTENSION, KVM_CAP_DIRTY_LOG_RING) <= 0;
    enable(acquires ? KVM_CAP_DIRTY_LOG_RING_ACQ_REL : KVM_CAP_DIRTY_LOG_RING, ring_entries * sizeof *ring);
    make_guest(kvm);
    ring = mmap(NULL, ring_entries * sizeof *ring, PROT_READ | PROT_WRITE, MAP_SHARED, vcpu, RING_PAGE * PAGE_BYTES);
    check(ring != MAP_FAILED, "mmap of a ring");
}

static void reap(void)
{
    int taken = 0;
    for (;; taken++) {
        struct kvm_dirty_gfn *entry = &ring[ring_next % ring_entries];
        if (__atomic_load_n(&entry->flags, __ATOMIC_ACQUIRE) != KVM_DIRTY_GFN_F_DIRTY)
            break;
        if (entry->slot == 0 && entry->offset < memory.pages)
            memory.words[entry->offset / 64] |= UINT64_C(1) << entry->offset % 64;
        __atomic_store_n(&entry->flags, KVM_DIRTY_GFN_F_RESET, __ATOMIC_RELEASE);
        ring_next++;
    }
    if (taken > 0)
        check(ioctl(vm, KVM_RESET_DIRTY_RINGS, 0) == taken, "KVM_RESET_DIRTY_RINGS");
}

static uint64_t take_bits(void)
{
    uint64_t count = count_bits();
    memset(memory.words, 0, (memory.pages + 63) / 64 * 8);
    return count;
}

static int64_t run_guest(const uint32_t *pages, uint64_t count)
{
    struct kvm_regs regs;
    uint32_t *list = (uint32_t *)(program + PAGE_BYTES);
    for (uint64_t i = 0; i < count; i++)
        list[i] = (uint32_t)(pages[i] * PAGE_BYTES);
    check(ioctl(vcpu, KVM_GET_REGS, &regs) == 0, "KVM_GET_REGS");
    regs.rip = PROGRAM_ADDRESS;
    regs.rsi = LIST_ADDRESS;
    regs.rcx = count;
    regs.rflags = 2;
    check(ioctl(vcpu, KVM_SET_REGS, &regs) == 0, "KVM_SET_REGS");
    int64_t began = now();
    check(ioctl(vcpu, KVM_RUN, 0) == 0, "KVM_RUN");
    int64_t taken = now() - began;
    errno = EIO;
    check(run->exit_reason == KVM_EXIT_HLT, "the guest did not halt");
    return taken;
}

static int64_t write_in_guest(const uint32_t *pages, uint64_t count)
{
    int64_t inside = 0;
    for (uint64_t first = 0; first < count; first += PAGES_PER_RUN) {
        if (first > 0 && ring != NULL) {
            int64_t began = now();
            reap();
            collected_early += now() - began;
        }
        inside += run_guest(pages + first, count - first < PAGES_PER_RUN ? count - first : PAGES_PER_RUN);
    }
    return inside;
}

const struct tracker kvm_log = {
    .prepare = prepare_log,
    .arm = arm,
    .collect = get_log,
    .collected = count_bits,
    .clear = clear_log,
    .disarm = disarm,
    .write = write_in_guest,
};

const struct tracker kvm_ring = {
    .prepare = prepare_ring,
    .arm = arm,
    .collect = reap,
    .collected = take_bits,
    .clear = clear_nothing,
    .disarm = disarm,
    .write = write_in_guest,
};
