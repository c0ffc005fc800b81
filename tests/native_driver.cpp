// A process around a compiled model that reads commands from stdin and answers on stdout, so that a model built for another
// processor, or with a sanitizer, can be used from Python. With COUNT_ALLOCATIONS it counts what `tinygpt_run` allocates.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

extern "C" {
void* tinygpt_open(int threads);
void* tinygpt_pool(void* model, int pool);
int tinygpt_run(void* model, int entry);
void tinygpt_close(void* model);
const char* tinygpt_missing();
const char* tinygpt_build();
}

namespace {
long allocations = 0;
}

#if defined(COUNT_ALLOCATIONS)
// Definitions in the program come before those of any library, so these see every allocation of the process.
extern "C" {
void* __libc_malloc(std::size_t);
void* __libc_calloc(std::size_t, std::size_t);
void* __libc_realloc(void*, std::size_t);
void* __libc_memalign(std::size_t, std::size_t);

static void count() { __atomic_fetch_add(&allocations, 1, __ATOMIC_RELAXED); }
void* malloc(std::size_t n) { return count(), __libc_malloc(n); }
void* calloc(std::size_t n, std::size_t size) { return count(), __libc_calloc(n, size); }
void* realloc(void* p, std::size_t n) { return count(), __libc_realloc(p, n); }
void* aligned_alloc(std::size_t alignment, std::size_t n) { return count(), __libc_memalign(alignment, n); }
int posix_memalign(void** p, std::size_t alignment, std::size_t n) {
  *p = aligned_alloc(alignment, n);
  return *p ? 0 : 12;
}
}
#endif

namespace {

std::int64_t number() {
  std::int64_t value;
  if (std::fread(&value, sizeof value, 1, stdin) != 1) std::exit(0);
  return value;
}

void answer(std::int64_t value) { std::fwrite(&value, sizeof value, 1, stdout); }

}  // namespace

int main(int argc, char** argv) {
  if (*tinygpt_missing()) return std::fprintf(stderr, "lacks %s\n", tinygpt_missing()), 3;
  void* const model = tinygpt_open(argc > 1 ? std::atoi(argv[1]) : 1);
  if (!model) return 4;
  std::fwrite(tinygpt_build(), 1, 64, stdout);
  std::fflush(stdout);
  std::int64_t during_runs = 0;
  for (int command; (command = std::getchar()) != EOF;) {
    if (command == 'x') {
      const std::int64_t entry = number();
      const long before = __atomic_load_n(&allocations, __ATOMIC_RELAXED);
      const int status = tinygpt_run(model, static_cast<int>(entry));
      during_runs += __atomic_load_n(&allocations, __ATOMIC_RELAXED) - before;
      answer(status);
    } else if (command == 'a') {
      answer(during_runs);
    } else if (command == 't') {  // what the counter would see
      std::free(std::malloc(1));
      answer(allocations);
    } else {
      const std::int64_t pool = number(), offset = number(), bytes = number();
      char* const place = static_cast<char*>(tinygpt_pool(model, static_cast<int>(pool))) + offset;
      if (command == 'w' && std::fread(place, 1, bytes, stdin) != static_cast<std::size_t>(bytes)) return 5;
      if (command == 'r') std::fwrite(place, 1, bytes, stdout);
    }
    std::fflush(stdout);
  }
  tinygpt_close(model);
  return 0;
}
