/*
 * How long the system calls alone take that tell which pages were written: the floor for dirtylog's trackers.
 *
 * trackers NAME BYTES [OPTION]: makes by hand the calls of one tracker, on that much memory of its own. Reads commands
 * from standard input, a line each, and answers each with a line: the nanoseconds that it took, and a number of pages.
 *
 *   pages COUNT      which pages will be written: so many 32-bit numbers follow the line
 *   write            adds 1 to a byte of each
 *   arm, disarm
 *   collect          answers how many pages were written
 *   clear PAGES      clears everything that was collected, that many pages a call
 */
#define _GNU_SOURCE
#include "trackers.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#define HUGE_PAGE_BYTES (UINT64_C(1) << 21)

static const struct {
    const char *name;
    const struct tracker *tracker;
    int shared;
} NAMES[] = {
    {"write-watch", &write_watch, 0},
    {"write-watch-memfd", &write_watch, 1},
    {"write-watch-initially-set", &initially_set_watch, 0},
    {"write-watch-memfd-initially-set", &initially_set_watch, 1},
    {"soft-dirty", &soft_dirty, 0},
    {"comparison", &comparison, 0},
    {"hashes", &hashes, 0},
    {"kvm-legacy", &kvm_log, 1},
    {"kvm-manual", &kvm_log, 1},
    {"kvm-initially-set", &kvm_log, 1},
    {"kvm-ring", &kvm_ring, 1},
};

struct memory memory;
int64_t collected_early;

static const struct tracker *tracker;
static uint32_t *chosen;
static uint64_t chosen_count;

void check(int fine, const char *what)
{
    if (!fine) {
        perror(what);
        exit(1);
    }
}

int64_t now(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec * INT64_C(1000000000) + time.tv_nsec;
}

uint64_t count_bits(void)
{
    uint64_t count = 0;
    for (uint64_t i = 0; i < (memory.pages + 63) / 64; i++)
        count += (uint64_t)__builtin_popcountll(memory.words[i]);
    return count;
}

static void map(uint64_t size, int shared)
{
    int fd = -1, flags = MAP_PRIVATE | MAP_ANONYMOUS;
    if (shared) {
        fd = memfd_create("trackers", MFD_CLOEXEC);
        check(fd >= 0 && ftruncate(fd, (off_t)size) == 0, "memfd_create");
        flags = MAP_SHARED;
    }
    unsigned char *room = mmap(NULL, size + HUGE_PAGE_BYTES, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    check(room != MAP_FAILED, "mmap");
    unsigned char *start = room + (-(uintptr_t)room % HUGE_PAGE_BYTES);
    memory.bytes = mmap(start, size, PROT_READ | PROT_WRITE, flags | MAP_FIXED, fd, 0);
    check(memory.bytes == start, "mmap");
    memory.size = size;
    memory.pages = size / PAGE_BYTES;
    memory.words = calloc(memory.pages / 64 + 1, 8);
    chosen = calloc(memory.pages, sizeof *chosen);
    check(memory.words != NULL && chosen != NULL, "calloc");
    for (uint64_t i = 0; i < memory.pages; i++)
        memory.bytes[i * PAGE_BYTES] = 1;
}

static int64_t write_chosen(void)
{
    if (tracker->write != NULL)
        return tracker->write(chosen, chosen_count);
    int64_t began = now();
    for (uint64_t i = 0; i < chosen_count; i++)
        ((volatile unsigned char *)memory.bytes)[chosen[i] * PAGE_BYTES]++;
    return now() - began;
}

static int64_t collect(void)
{
    int64_t early = collected_early, began = now();
    tracker->collect();
    collected_early = 0;
    return now() - began + early;
}

static int64_t clear(uint64_t step)
{
    int64_t began = now();
    for (uint64_t first = 0; step > 0 && first < memory.pages; first += step)
        tracker->clear(first, step < memory.pages - first ? step : memory.pages - first);
    return now() - began;
}

static int64_t timed(void (*call)(void))
{
    int64_t began = now();
    call();
    return now() - began;
}

static void choose(uint64_t count)
{
    check(count <= memory.pages && fread(chosen, sizeof *chosen, count, stdin) == count, "pages");
    for (uint64_t i = 0; i < count; i++)
        check(chosen[i] < memory.pages, "page");
    chosen_count = count;
}

int main(int argc, char **argv)
{
    char command[16], line[64];
    unsigned long long number;
    for (size_t i = 0; argc >= 3 && i < LENGTH(NAMES); i++)
        if (strcmp(argv[1], NAMES[i].name) == 0) {
            tracker = NAMES[i].tracker;
            map(strtoull(argv[2], NULL, 10), NAMES[i].shared);
        }
    if (tracker == NULL) {
        fprintf(stderr, "usage: trackers NAME BYTES [OPTION]\n");
        return 2;
    }
    if (tracker->prepare != NULL)
        tracker->prepare(argv[1], argc > 3 ? argv[3] : "");
    while (fgets(line, sizeof line, stdin) != NULL) {
        int64_t taken = 0;
        uint64_t pages = 0;
        number = 0;
        check(sscanf(line, "%15s %llu", command, &number) >= 1, "command");
        if (strcmp(command, "pages") == 0)
            choose(number);
        else if (strcmp(command, "write") == 0)
            taken = write_chosen();
        else if (strcmp(command, "arm") == 0)
            taken = timed(tracker->arm);
        else if (strcmp(command, "collect") == 0) {
            taken = collect();
            pages = tracker->collected();
        } else if (strcmp(command, "clear") == 0)
            taken = clear(number);
        else if (strcmp(command, "disarm") == 0)
            taken = timed(tracker->disarm);
        else
            check(0, command);
        printf("%lld %llu\n", (long long)taken, (unsigned long long)pages);
        fflush(stdout);
    }
    return 0;
}
