/*
 * How fast a compiled program lists the runs of a bitmap: the floor for dirtylog's own listing.
 *
 * Reads a bitmap of little-endian 64-bit words from standard input, a regular file, lists the runs of ones in it as often
 * as the argument says, and prints for each time the number of runs and the nanoseconds. As a vector does, the list grows
 * when it is full, and starts anew each time.
 */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

struct list {
    uint64_t *edges; /* where runs begin and end, in turn; then beginnings and lengths */
    size_t used, room;
};

static void check(int fine, const char *what)
{
    if (!fine) {
        perror(what);
        exit(1);
    }
}

static void list_edges(struct list *list, const uint64_t *words, size_t count)
{
    uint64_t before = 0;
    for (size_t i = 0; i < count; i++) {
        uint64_t edges = words[i] ^ (words[i] << 1 | before);
        before = words[i] >> 63;
        if (list->room - list->used < 66) {
            list->room = 2 * list->room + 66;
            list->edges = realloc(list->edges, list->room * sizeof *list->edges);
            check(list->edges != NULL, "realloc");
        }
        for (; edges; edges &= edges - 1)
            list->edges[list->used++] = 64 * i + (uint64_t)__builtin_ctzll(edges);
    }
    if (before)
        list->edges[list->used++] = 64 * count;
    for (size_t i = 0; i < list->used; i += 2)
        list->edges[i + 1] -= list->edges[i];
}

static int64_t now(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec * 1000000000LL + time.tv_nsec;
}

int main(int argc, char **argv)
{
    struct stat status;
    check(argc == 2 && fstat(0, &status) == 0, "usage: list_runs TIMES < BITMAP");
    char *bytes = malloc((size_t)status.st_size + 1);
    check(bytes != NULL, "malloc");
    for (off_t done = 0; done < status.st_size;) {
        ssize_t got = read(0, bytes + done, (size_t)(status.st_size - done));
        check(got > 0, "read");
        done += got;
    }
    for (int times = atoi(argv[1]); times > 0; times--) {
        struct list list = {0};
        int64_t begin = now();
        list_edges(&list, (const uint64_t *)bytes, (size_t)status.st_size / 8);
        int64_t end = now();
        printf("%zu %lld\n", list.used / 2, (long long)(end - begin));
        free(list.edges);
    }
    free(bytes);
    return 0;
}
