#include "tests/simt/report.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <sstream>
#include <string_view>

#include <cxxabi.h>
#include <elf.h>
#include <link.h>
#include <unistd.h>

namespace simt {
namespace {

std::string program_path() {
  char path[4096];
  const ssize_t length = readlink("/proc/self/exe", path, sizeof path);
  return length > 0 ? std::string(path, static_cast<std::size_t>(length)) : "";
}

// From the folder of the layer on: "kernels/norm.cu".
std::string short_path(std::string_view path) {
  for (const std::string_view folder : {"/kernels/", "/tests/"}) {
    if (const auto at = path.rfind(folder); at != std::string_view::npos) {
      return std::string(path.substr(at + 1));
    }
  }
  return std::string(path);
}

std::string demangled(const char* name) {
  int status = 0;
  char* text = abi::__cxa_demangle(name, nullptr, nullptr, &status);
  const std::string result = status == 0 ? text : name;
  std::free(text);
  const auto last = result.rfind("::");
  return last == std::string::npos ? result : result.substr(last + 2);
}

std::string coordinates(const uint3& at) {
  return "(" + std::to_string(at.x) + "," + std::to_string(at.y) + "," + std::to_string(at.z) + ")";
}

}  // namespace

std::uintptr_t program_base() {
  static const std::uintptr_t base = [] {
    std::uintptr_t found = 0;
    dl_iterate_phdr(
        [](dl_phdr_info* info, std::size_t, void* data) {
          *static_cast<std::uintptr_t*>(data) = info->dlpi_addr;
          return 1;  // the first one is the program
        },
        &found);
    return found;
  }();
  return base;
}

std::vector<StaticVariable> static_locals() {
  std::ifstream file(program_path(), std::ios::binary);
  const std::string bytes{std::istreambuf_iterator<char>(file), {}};
  std::vector<StaticVariable> variables;
  if (bytes.size() < sizeof(Elf64_Ehdr)) {
    return variables;
  }
  const auto& header = *reinterpret_cast<const Elf64_Ehdr*>(bytes.data());
  const auto* sections = reinterpret_cast<const Elf64_Shdr*>(bytes.data() + header.e_shoff);
  for (int i = 0; i < header.e_shnum; ++i) {
    if (sections[i].sh_type != SHT_SYMTAB) {
      continue;
    }
    const char* names = bytes.data() + sections[sections[i].sh_link].sh_offset;
    const auto* symbols = reinterpret_cast<const Elf64_Sym*>(bytes.data() + sections[i].sh_offset);
    for (std::size_t s = 0; s < sections[i].sh_size / sizeof(Elf64_Sym); ++s) {
      const Elf64_Sym& symbol = symbols[s];
      const char* name = names + symbol.st_name;
      const bool in_bss = symbol.st_shndx < header.e_shnum &&
                          sections[symbol.st_shndx].sh_type == SHT_NOBITS &&
                          (sections[symbol.st_shndx].sh_flags & SHF_TLS) == 0;
      if (ELF64_ST_TYPE(symbol.st_info) == STT_OBJECT && in_bss && symbol.st_size > 0 &&
          std::strncmp(name, "_ZZ", 3) == 0) {
        variables.push_back({program_base() + symbol.st_value, symbol.st_size, demangled(name)});
      }
    }
  }
  return variables;
}

std::string place_of(std::uintptr_t pc) {
  char text[32];
  std::snprintf(text, sizeof text, "0x%zx", pc - 1 - program_base());
  const std::string command = "addr2line -i -e '" + program_path() + "' " + text + " 2>/dev/null";
  FILE* pipe = popen(command.c_str(), "r");
  if (pipe == nullptr) {
    return text;
  }
  // Innermost first; a line of the kernel's own file says more than one of its header.
  std::string first, in_kernel;
  char line[4096];
  while (std::fgets(line, sizeof line, pipe) != nullptr) {
    std::string place(line, std::strcspn(line, " \n"));
    if (place.find('?') != std::string::npos) {
      continue;
    }
    first = first.empty() ? place : first;
    if (in_kernel.empty() && place.find(".cuh:") == std::string::npos &&
        place.find("simt.h:") == std::string::npos) {
      in_kernel = place;
    }
  }
  pclose(pipe);
  const std::string& best = in_kernel.empty() ? first : in_kernel;
  return best.empty() ? text : short_path(best);
}

std::string to_string(const Place& place) {
  return short_path(place.file_name()) + ":" + std::to_string(place.line());
}

std::string kind_name(Finding::Kind kind) {
  switch (kind) {
    case Finding::Kind::none:
      break;
    case Finding::Kind::race:
      return "race";
    case Finding::Kind::bounds:
    case Finding::Kind::index:
      return "out of bounds";
    case Finding::Kind::misaligned:
      return "misaligned";
    case Finding::Kind::uninitialised:
      return "uninitialised";
    case Finding::Kind::divergent:
      return "divergent barrier";
    case Finding::Kind::mask:
      return "mask";
    case Finding::Kind::deadlock:
      return "deadlock";
  }
  return "none";
}

std::string report(const char* kernel, const Finding& finding, const std::string& where,
                   const std::string& waiting) {
  std::ostringstream text;
  text << "[" << kernel << "] " << kind_name(finding.kind) << ": block "
       << coordinates(finding.access.block) << " thread " << coordinates(finding.access.thread);
  if (finding.address != 0 || finding.bytes != 0) {
    text << (finding.access.atomic  ? " updates "
             : finding.access.write ? " writes "
                                    : " reads ")
         << finding.bytes << " bytes at " << where << " at " << place_of(finding.access.pc);
  } else if (finding.file[0] != '\0') {
    text << ": " << finding.note << " at " << short_path(finding.file) << ":" << finding.line;
  } else {
    text << ": " << finding.note << "; " << waiting;
  }
  if (finding.kind == Finding::Kind::race) {
    text << "; "
         << (finding.other_block ? "another block" : "thread " + coordinates(finding.other.thread))
         << (finding.other.atomic  ? " updated"
             : finding.other.write ? " wrote"
                                   : " read")
         << " it at " << place_of(finding.other.pc) << ", unordered";
  }
  return text.str();
}

}  // namespace simt
