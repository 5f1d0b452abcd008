#include "isas.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#elif defined(__aarch64__) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#elif defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>
#endif

namespace smoothq {

const Table* plain();

namespace {

struct Isa {
    const Table* (*table)();
    bool (*has)();
};

}  // namespace

#if defined(__x86_64__)

const Table* avx2();
const Table* avxvnni();
const Table* avx512();
const Table* avx512vnni();
const Table* amx();

namespace {

bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }

bool has_avxvnni() {
    unsigned a, b, c, d;  // __builtin_cpu_supports knows it in newer compilers alone
    return has_avx2() && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 4 & 1);
}

bool has_avx512() {
    return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

bool has_avx512vnni() { return has_avx512() && __builtin_cpu_supports("avx512vnni"); }

#if defined(__linux__)

// The processor's tiles are a process's own when it has asked for them.
bool has_amx() {
    constexpr int ASK = 0x1023, TILE_DATA = 18;
    unsigned a, b, c, d;
    return has_avx512vnni() && __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d >> 22 & 1) &&
           (d >> 24 & 1) && !syscall(SYS_arch_prctl, ASK, TILE_DATA);
}

#else

bool has_amx() { return false; }

#endif

constexpr Isa BEST_FIRST[] = {{amx, has_amx},
                              {avx512vnni, has_avx512vnni},
                              {avxvnni, has_avxvnni},
                              {avx512, has_avx512},
                              {avx2, has_avx2}};

#elif defined(__aarch64__)

const Table* dotprod();
const Table* i8mm();

namespace {

#if defined(__APPLE__)

bool has(const char* feature) {
    int value = 0;
    size_t size = sizeof value;
    return !sysctlbyname(feature, &value, &size, nullptr, 0) && value;
}

bool has_dotprod() { return has("hw.optional.arm.FEAT_DotProd"); }
bool has_i8mm() { return has_dotprod() && has("hw.optional.arm.FEAT_I8MM"); }

#elif defined(__linux__)

bool has_dotprod() { return getauxval(AT_HWCAP) & HWCAP_ASIMDDP; }
bool has_i8mm() { return has_dotprod() && (getauxval(AT_HWCAP2) & HWCAP2_I8MM); }

#else

bool has_dotprod() { return false; }
bool has_i8mm() { return false; }

#endif

constexpr Isa BEST_FIRST[] = {{i8mm, has_i8mm}, {dotprod, has_dotprod}};

#else

namespace {

constexpr Isa BEST_FIRST[] = {{plain, [] { return true; }}};

#endif

std::vector<const Table*> tables() {
    std::vector<const Table*> here;
    for (const Isa& isa : BEST_FIRST)
        if (isa.has()) here.push_back(isa.table());
    if (here.empty() || here.back() != plain()) here.push_back(plain());
    return here;
}

const Table& named(const std::string& name) {
    std::string names;
    for (const Table* table : tables()) {
        if (name == table->name) return *table;
        names += std::string(names.empty() ? "" : ", ") + table->name;
    }
    throw std::invalid_argument("SMOOTHQ_CPU_ISA=" + name +
                                " is not of this processor, which has: " + names);
}

const Table& first() {
    const char* asked = std::getenv("SMOOTHQ_CPU_ISA");
    return asked && *asked ? named(asked) : *tables().front();
}

std::atomic<const Table*>& current() {
    static std::atomic<const Table*> table{&first()};
    return table;
}

}  // namespace

const Table& table() { return *current().load(std::memory_order_relaxed); }

void use(const std::string& name) { current().store(&named(name)); }

std::vector<std::string> runnable() {
    std::vector<std::string> names;
    for (const Table* table : tables()) names.emplace_back(table->name);
    return names;
}

}  // namespace smoothq
