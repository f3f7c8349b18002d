/* Writes noted in the page tables: write protection that lifts itself (Linux 6.7), and soft-dirty bits. */
#define _GNU_SOURCE
#include "trackers.h"

#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

/* Older headers have none of these (include/uapi/linux/fs.h, include/uapi/linux/userfaultfd.h). */
struct scan_argument {
    uint64_t size, flags, start, end, walk_end, vec, vec_len, max_pages;
    uint64_t category_inverted, category_mask, category_anyof_mask, return_mask;
};
struct region {
    uint64_t start, end, categories;
};
#define SCAN _IOWR('f', 16, struct scan_argument)
#define SCAN_PROTECT 1
#define SCAN_CHECK_ASYNC 2
#define IS_WRITTEN 2
#define WP_HUGETLBFS_SHMEM (UINT64_C(1) << 12)
#define WP_UNPOPULATED (UINT64_C(1) << 13)
#define WP_ASYNC (UINT64_C(1) << 15)

#define REGIONS_PER_CALL 131072
#define ENTRIES_PER_READ 65536
#define SOFT_DIRTY_BIT 55

static int pagemap, uffd, clear_refs;
static struct region *regions;
static uint64_t region_count;

/* Each call has as much room as dirtylog gives it, behind what the calls before have found. */
static uint64_t scan(uint64_t start, uint64_t end, uint64_t flags)
{
    uint64_t count = 0;
    while (start < end) {
        struct scan_argument argument = {
            .size = sizeof argument,
            .flags = flags,
            .start = start,
            .end = end,
            .vec = (uintptr_t)(regions + count),
            .vec_len = REGIONS_PER_CALL,
            .category_mask = IS_WRITTEN,
            .return_mask = IS_WRITTEN,
        };
        int found = ioctl(pagemap, SCAN, &argument);
        check(found >= 0, "PAGEMAP_SCAN");
        count += (uint64_t)found;
        /* Only a call that ran out of room is to be continued: others may say so of an earlier stage of theirs. */
        if (found < REGIONS_PER_CALL)
            break;
        start = argument.walk_end > regions[count - 1].end ? argument.walk_end : regions[count - 1].end;
    }
    return count;
}

static void prepare_watch(const char *name, const char *option)
{
    (void)name, (void)option;
    regions = calloc(memory.pages / 2 + 1 + REGIONS_PER_CALL, sizeof *regions);
    check(regions != NULL, "calloc");
}

static void watch(void)
{
    struct uffdio_api api = {.api = UFFD_API, .features = WP_HUGETLBFS_SHMEM | WP_UNPOPULATED | WP_ASYNC};
    struct uffdio_register range = {
        .range = {.start = (uintptr_t)memory.bytes, .len = memory.size},
        .mode = UFFDIO_REGISTER_MODE_WP,
    };
    pagemap = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
    check(pagemap >= 0, "/proc/self/pagemap");
    uffd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK);
    if (uffd < 0)
        uffd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK | 1); /* user mode only, which anybody may have */
    check(uffd >= 0, "userfaultfd");
    check(ioctl(uffd, UFFDIO_API, &api) == 0, "UFFDIO_API");
    check(ioctl(uffd, UFFDIO_REGISTER, &range) == 0, "UFFDIO_REGISTER");
    region_count = 0;
}

static void watch_and_protect(void)
{
    watch();
    scan((uintptr_t)memory.bytes, (uintptr_t)memory.bytes + memory.size, SCAN_PROTECT | SCAN_CHECK_ASYNC);
}

static void scan_all(void)
{
    region_count = scan((uintptr_t)memory.bytes, (uintptr_t)memory.bytes + memory.size, SCAN_CHECK_ASYNC);
    check(msync(memory.bytes, memory.size, MS_ASYNC) == 0, "msync");
}

static uint64_t pages_in_regions(void)
{
    uint64_t pages = 0;
    for (uint64_t i = 0; i < region_count; i++)
        pages += (regions[i].end - regions[i].start) / PAGE_BYTES;
    return pages;
}

static void protect(uint64_t first, uint64_t pages)
{
    if (region_count == 0)
        return;
    unsigned char *start = memory.bytes + first * PAGE_BYTES;
    scan((uintptr_t)start, (uintptr_t)start + pages * PAGE_BYTES, SCAN_PROTECT | SCAN_CHECK_ASYNC);
    check(msync(start, pages * PAGE_BYTES, MS_ASYNC) == 0, "msync");
}

static void unwatch(void)
{
    struct uffdio_range range = {.start = (uintptr_t)memory.bytes, .len = memory.size};
    check(ioctl(uffd, UFFDIO_UNREGISTER, &range) == 0, "UFFDIO_UNREGISTER");
    close(uffd);
    close(pagemap);
}

const struct tracker write_watch = {
    .prepare = prepare_watch,
    .arm = watch_and_protect,
    .collect = scan_all,
    .collected = pages_in_regions,
    .clear = protect,
    .disarm = unwatch,
};

const struct tracker initially_set_watch = {
    .prepare = prepare_watch,
    .arm = watch,
    .collect = scan_all,
    .collected = pages_in_regions,
    .clear = protect,
    .disarm = unwatch,
};

static void open_soft_dirty(const char *name, const char *option)
{
    (void)name, (void)option;
    pagemap = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
    check(pagemap >= 0, "/proc/self/pagemap");
}

static void clear_soft_dirty(void)
{
    clear_refs = open("/proc/self/clear_refs", O_WRONLY | O_CLOEXEC);
    check(clear_refs >= 0 && write(clear_refs, "4", 1) == 1, "/proc/self/clear_refs");
    close(clear_refs);
}

static void read_soft_dirty(void)
{
    static uint64_t entries[ENTRIES_PER_READ];
    memset(memory.words, 0, (memory.pages + 63) / 64 * 8);
    for (uint64_t first = 0; first < memory.pages; first += ENTRIES_PER_READ) {
        uint64_t count = memory.pages - first < ENTRIES_PER_READ ? memory.pages - first : ENTRIES_PER_READ;
        off_t offset = (off_t)(((uintptr_t)memory.bytes / PAGE_BYTES + first) * 8);
        check(pread(pagemap, entries, count * 8, offset) == (ssize_t)(count * 8), "pread of pagemap");
        for (uint64_t i = 0; i < count; i++)
            memory.words[(first + i) / 64] |= (entries[i] >> SOFT_DIRTY_BIT & 1) << (first + i) % 64;
    }
    clear_soft_dirty();
}

static void nothing(void)
{
}

static void clear_nothing(uint64_t first, uint64_t pages)
{
    (void)first, (void)pages;
}

const struct tracker soft_dirty = {
    .prepare = open_soft_dirty,
    .arm = clear_soft_dirty,
    .collect = read_soft_dirty,
    .collected = count_bits,
    .clear = clear_nothing,
    .disarm = nothing,
};
