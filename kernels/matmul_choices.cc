#include "kernels/matmul_choices.h"

#include <cerrno>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <string_view>
#include <utility>

#include <fmt/format.h>
#include <unistd.h>

#include "core/dtype.h"

namespace reprise::kernels {
namespace {

constexpr std::string_view kTitle = "reprise matmul choices 1";

std::uint64_t digest(std::string_view text) {  // FNV-1a
  std::uint64_t hash = 0xcbf29ce484222325u;
  for (const char c : text) {
    hash = (hash ^ static_cast<unsigned char>(c)) * 0x100000001b3u;
  }
  return hash;
}

std::string entry(const std::string& key, const MatmulAlgorithm& algorithm) {
  std::string line = key + " =";
  for (const std::uint64_t word : algorithm) {
    line += fmt::format(" {:016x}", word);
  }
  return line;
}

// False where the line is not as entry() and its digest make it.
bool parse(const std::string& line, std::string& key, MatmulAlgorithm& algorithm) {
  const std::size_t mark = line.rfind(" # "), equals = line.find(" =");
  if (mark == std::string::npos || equals == std::string::npos || equals > mark) {
    return false;
  }
  const std::string body = line.substr(0, mark);
  if (line.substr(mark + 3) != fmt::format("{:016x}", digest(body))) {
    return false;
  }
  key = body.substr(0, equals);
  const char* at = body.c_str() + equals + 2;
  for (std::uint64_t& word : algorithm) {
    char* end = nullptr;
    word = std::strtoull(at, &end, 16);
    if (end == at) {
      return false;
    }
    at = end;
  }
  return true;
}

}  // namespace

std::string matmul_choice_key(const TileShape& s, const std::array<int, 3>& aligned) {
  return fmt::format("m{} n{} k{} lda{} ldb{} ldc{} {}{} {}-{}{}{} align{},{},{}", s.m, s.n, s.k,
                     s.lda, s.ldb, s.ldc, s.transpose_a ? 't' : 'n', s.transpose_b ? 't' : 'n',
                     name(s.inputs), name(s.output), s.accumulate ? " add" : "",
                     s.bias ? fmt::format(" bias-{}", name(*s.bias)) : "", aligned[0], aligned[1],
                     aligned[2]);
}

MatmulChoices::MatmulChoices(std::string file, std::string card, std::int64_t library_version)
    : file_(std::move(file)), card_(std::move(card)), version_(library_version) {
  read();
}

std::optional<MatmulAlgorithm> MatmulChoices::find(const std::string& key) const {
  const auto at = choices_.find(key);
  return at == choices_.end() ? std::nullopt : std::optional(at->second);
}

void MatmulChoices::add(const std::string& key, const MatmulAlgorithm& algorithm) {
  choices_[key] = algorithm;
  write();
}

void MatmulChoices::drop(const std::string& key) {
  choices_.erase(key);
  warning_ = fmt::format("{}: the library does not take the choice for {}: ignored", file_, key);
}

std::string MatmulChoices::header() const {
  return fmt::format("card {}, library {}", card_, version_);
}

void MatmulChoices::read() {
  std::ifstream in(file_);
  if (!in) {
    return;  // the first search makes it
  }
  std::string line;
  const auto ignore = [&](const std::string& why) {
    choices_.clear();
    warning_ = fmt::format("{}: {}: ignored", file_, why);
  };
  if (!std::getline(in, line) || line != kTitle) {
    return ignore("it is no file of choices");
  }
  if (!std::getline(in, line) || line != header()) {
    return ignore(fmt::format("it is for {}, this is {}", line, header()));
  }
  for (int number = 3; std::getline(in, line); ++number) {
    std::string key;
    MatmulAlgorithm algorithm{};
    if (!parse(line, key, algorithm)) {
      return ignore(fmt::format("line {} is damaged", number));
    }
    choices_[key] = algorithm;
  }
}

void MatmulChoices::write() {
  const std::string beside = fmt::format("{}.{}.new", file_, getpid());  // others may write too
  std::ofstream out(beside, std::ios::trunc);
  out << kTitle << '\n' << header() << '\n';
  for (const auto& [key, algorithm] : choices_) {
    const std::string line = entry(key, algorithm);
    out << line << fmt::format(" # {:016x}", digest(line)) << '\n';
  }
  out.close();
  if (!out || std::rename(beside.c_str(), file_.c_str()) != 0) {
    warning_ = fmt::format("{}: cannot be written: {}", file_, std::strerror(errno));
    std::remove(beside.c_str());
  }
}

}  // namespace reprise::kernels
