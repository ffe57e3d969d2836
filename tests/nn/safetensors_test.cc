#include "nn/weights/safetensors.h"

#include <bit>
#include <cmath>
#include <csignal>
#include <cstring>
#include <limits>

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/resource.h>

#include "tests/nn/files.h"

namespace reprise::nn {
namespace {

using testing::contents;
using testing::Folder;
using testing::golden;
using ::testing::HasSubstr;
using ::testing::StartsWith;

// A file of this header and as many bytes of tensors.
std::string file_of(const std::string& header, std::size_t data_bytes) {
  std::string file;
  for (int i = 0; i < 8; ++i) {
    file += static_cast<char>(header.size() >> (8 * i) & 0xff);
  }
  return file + header + std::string(data_bytes, '\1');
}

absl::StatusOr<SafetensorsHeader> parse(const std::string& file) {
  return parse_safetensors(std::as_bytes(std::span(file)), "a.safetensors");
}

struct Rejection {
  std::string what, header;
  std::size_t data_bytes;
  std::string message;  // after the path
};

const std::string kA = R"("dtype":"F32","shape":[1],"data_offsets":[0,4])";
const std::string kSyntax = "InvalidHeaderDeserialization: ";

const std::vector<Rejection> kRejections = {
    {"utf-8", "{\"\xff\":{}}", 0, "InvalidHeader: byte 10: not valid UTF-8"},
    {"overlong", "{\"\xc0\x80\":{}}", 0, "InvalidHeader: byte 10: not valid UTF-8"},
    {"syntax", "{\"a\":", 0, kSyntax + "byte 13: not valid JSON"},
    {"empty header", "", 0, kSyntax + "byte 8: not valid JSON"},
    {"trailing garbage", "{} x", 0, kSyntax + "byte 11: not valid JSON"},
    {"second object", "{}{}", 0, kSyntax + "byte 10: not valid JSON"},
    {"zero byte", std::string("{}\0x", 4), 0, kSyntax + "byte 10: not valid JSON"},
    {"byte order mark", "\xef\xbb\xbf{}", 0, kSyntax + "byte 8: not valid JSON"},
    {"array", "[]", 0, kSyntax + "the header must be an object, got an array"},
    {"number", "7", 0, kSyntax + "the header must be an object, got a number"},
    {"null", "null", 0, kSyntax + "the header must be an object, got null"},
    {"entry is a number", R"({"a":1})", 0, kSyntax + "\"a\": must be an object, got a number"},
    {"entry is null", R"({"a":null})", 0, kSyntax + "\"a\": must be an object, got null"},
    {"entry is an array", R"({"a":["F32",[1],[0,4]]})", 4,
     kSyntax + "\"a\": must be an object, got an array"},
    {"dtype unknown", R"({"a":{"dtype":"F31","shape":[1],"data_offsets":[0,4]}})", 4,
     kSyntax + "\"a\": dtype \"F31\" is not known"},
    {"dtype of a wrong kind", R"({"a":{"dtype":1,"shape":[1],"data_offsets":[0,4]}})", 4,
     kSyntax + "\"a\": dtype must not be a number"},
    {"dtype missing", R"({"a":{"shape":[1],"data_offsets":[0,4]}})", 4,
     kSyntax + "\"a\": dtype is missing"},
    {"shape missing", R"({"a":{"dtype":"F32","data_offsets":[0,4]}})", 4,
     kSyntax + "\"a\": shape is missing"},
    {"offsets missing", R"({"a":{"dtype":"F32","shape":[1]}})", 4,
     kSyntax + "\"a\": data_offsets is missing"},
    {"shape of a wrong kind", R"({"a":{"dtype":"F32","shape":"1","data_offsets":[0,4]}})", 4,
     kSyntax + "\"a\": shape must not be a string"},
    {"negative size", R"({"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}})", 4,
     kSyntax + "\"a\": shape must hold whole numbers from 0, got a negative number"},
    {"minus zero", R"({"a":{"dtype":"F32","shape":[-0],"data_offsets":[0,0]}})", 0,
     kSyntax + "\"a\": shape must hold whole numbers from 0, got a negative number"},
    {"fraction", R"({"a":{"dtype":"F32","shape":[1.0],"data_offsets":[0,4]}})", 4,
     kSyntax + "\"a\": shape must hold whole numbers from 0, got the number 1.0"},
    {"size above 64 bits",
     R"({"a":{"dtype":"F32","shape":[18446744073709551616],"data_offsets":[0,4]}})", 4,
     kSyntax + "\"a\": shape must hold whole numbers from 0, got the number 18446744073709551616"},
    {"negative offset", R"({"a":{"dtype":"F32","shape":[1],"data_offsets":[-4,0]}})", 0,
     kSyntax + "\"a\": data_offsets must hold whole numbers from 0, got a negative number"},
    {"one offset", R"({"a":{"dtype":"F32","shape":[1],"data_offsets":[4]}})", 4,
     kSyntax + "\"a\": data_offsets must hold two numbers"},
    {"three offsets", R"({"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4,4]}})", 4,
     kSyntax + "\"a\": data_offsets must hold two numbers"},
    {"nested shape", R"({"a":{"dtype":"F32","shape":[[1]],"data_offsets":[0,4]}})", 4,
     kSyntax + "\"a\": shape must hold whole numbers from 0, got an array"},
    {"metadata value", R"({"__metadata__":{"a":1}})", 0,
     kSyntax + "\"a\": metadata must be a string, got a number"},
    {"metadata is a string", R"({"__metadata__":"a"})", 0,
     kSyntax + "\"__metadata__\": must be an object, got a string"},
    {"metadata twice", R"({"__metadata__":{},"__metadata__":{}})", 0,
     kSyntax + "\"__metadata__\": it is given twice"},
    {"metadata twice, once null", R"({"__metadata__":null,"__metadata__":{}})", 0,
     kSyntax + "\"__metadata__\": it is given twice"},
    {"a field twice", R"({"a":{"dtype":"F32","dtype":"F32","shape":[1],"data_offsets":[0,4]}})", 4,
     kSyntax + "\"a\": dtype is given twice"},
    {"a name twice", "{\"a\":{" + kA + "},\"a\":{" + kA + "}}", 4,
     kSyntax + "\"a\": the name is given twice"},
    {"a name twice, escaped", "{\"a\":{" + kA + "},\"\\u0061\":{" + kA + "}}", 4,
     kSyntax + "\"a\": the name is given twice"},
    {"nested too deep", "{\"a\":{\"x\":" + std::string(200, '[') + std::string(200, ']') + "}}", 0,
     kSyntax + "\"a\": nested too deep"},
    {"hole at the start", R"({"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}})", 8,
     "InvalidOffset(a): data_offsets [4, 8] must start at 0"},
    {"hole", "{\"a\":{" + kA + R"(},"b":{"dtype":"U8","shape":[1],"data_offsets":[5,6]}})", 6,
     "InvalidOffset(b): data_offsets [5, 6] must start at 4"},
    {"overlap", "{\"a\":{" + kA + R"(},"b":{"dtype":"U8","shape":[1],"data_offsets":[3,4]}})", 4,
     "InvalidOffset(b): data_offsets [3, 4] must start at 4"},
    {"alias", "{\"a\":{" + kA + "},\"b\":{" + kA + "}}", 4,
     "InvalidOffset(b): data_offsets [0, 4] must start at 4"},
    {"end before begin",
     R"({"a":{"dtype":"F32","shape":[0],"data_offsets":[0,0]},)"
     R"("b":{"dtype":"F32","shape":[1],"data_offsets":[4,0]}})",
     4, "InvalidOffset(b): data_offsets [4, 0] must start at 0"},
    {"end before begin, in place",
     "{\"a\":{" + kA + R"(},"b":{"dtype":"F32","shape":[1],"data_offsets":[4,2]}})", 4,
     "InvalidOffset(b): data_offsets [4, 2] must start at 4"},
    {"product overflows",
     R"({"a":{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,4]}})", 4,
     "ValidationOverflow: the size of \"a\" does not fit 64 bits"},
    {"bits overflow", R"({"a":{"dtype":"F32","shape":[2305843009213693952],"data_offsets":[0,4]}})",
     4, "ValidationOverflow: the size of \"a\" does not fit 64 bits"},
    {"part of a byte", R"({"a":{"dtype":"F4","shape":[3],"data_offsets":[0,2]}})", 2,
     "MisalignedSlice: \"a\" holds 12 bits, not whole bytes"},
    {"too few bytes", R"({"a":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}})", 4,
     "TensorInvalidInfo: \"a\" has 4 bytes, its dtype and shape ask for 8"},
    {"short file", "{\"a\":{" + kA + "}}", 3,
     "MetadataIncompleteBuffer: the header tells of 4 bytes of tensors, the file holds 3"},
    {"trailing bytes", "{\"a\":{" + kA + "}}", 5,
     "MetadataIncompleteBuffer: the header tells of 4 bytes of tensors, the file holds 5"},
};

TEST(Safetensors, RejectsWhatTheReferenceReaderRejects) {
  for (const Rejection& row : kRejections) {
    SCOPED_TRACE(row.what);
    const auto result = parse(file_of(row.header, row.data_bytes));
    ASSERT_FALSE(result.ok());
    EXPECT_EQ(result.status().message(), "a.safetensors: " + row.message);
  }
}

TEST(Safetensors, RejectsHeaderLengthsThatCannotBe) {
  EXPECT_EQ(parse("1234567").status().message(),
            "a.safetensors: HeaderTooSmall: the file has 7 bytes, 8 are the least");
  EXPECT_EQ(parse(std::string("\x01\xe1\xf5\x05\0\0\0\0{}", 10)).status().message(),
            "a.safetensors: HeaderTooLarge: bytes 0-7 tell of a header of 100000001 bytes, "
            "100000000 are the most");
  EXPECT_THAT(std::string(parse(std::string(8, '\xff')).status().message()),
              HasSubstr("HeaderTooLarge"));
  EXPECT_EQ(
      parse(std::string("\x03\0\0\0\0\0\0\0{}", 10)).status().message(),
      "a.safetensors: InvalidHeaderLength: bytes 0-7 tell of a header of 3 bytes, the file has "
      "2 after them");
}

TEST(Safetensors, AcceptsWhatTheReferenceReaderAccepts) {
  for (const auto& [header, bytes] : std::vector<std::pair<std::string, std::size_t>>{
           {"{}", 0},
           {" \n\t{ } \r", 0},
           {R"({"__metadata__":null})", 0},
           {R"({"a":{"dtype":"F32","shape":[],"data_offsets":[0,4]}})", 4},
           {R"({"a":{"dtype":"F32","shape":[3,0,9],"data_offsets":[0,0]}})", 0},
           {R"({"a":{"dtype":"F4","shape":[4],"data_offsets":[0,2]}})", 2},
           {R"({"a":{"dtype":"F32","x":[{"dtype":"no","y":[-1,2.5]},null],"shape":[1],)"
            R"("data_offsets":[0,4],"z":{"shape":[]},"w":true}})",
            4},
           {R"({"b":{"dtype":"U8","shape":[1],"data_offsets":[4,5]},"a":{)" + kA + "}}", 5},
       }) {
    SCOPED_TRACE(header);
    EXPECT_TRUE(parse(file_of(header, bytes)).ok()) << parse(file_of(header, bytes)).status();
  }
  const auto file = parse(file_of(R"({"b":{"dtype":"U8","shape":[1],"data_offsets":[4,5]},"a":{)" +
                                      kA + R"(},"__metadata__":{"format":"pt","k":"\u00e9"}})",
                                  5));
  ASSERT_TRUE(file.ok());
  EXPECT_EQ(file->tensors[0].name, "a");
  EXPECT_EQ(file->tensors[1].name, "b");
  EXPECT_EQ(file->metadata, (Metadata{{"format", "pt"}, {"k", "\xc3\xa9"}}));
}

TEST(Safetensors, TellsOfFilesThatCannotBeOpened) {
  const Folder folder;
  EXPECT_EQ(SafetensorsFile::open(folder.at("none")).status().code(), absl::StatusCode::kNotFound);
  EXPECT_THAT(std::string(SafetensorsFile::open(folder.at("none")).status().message()),
              StartsWith(folder.at("none")));
  EXPECT_EQ(SafetensorsFile::open(folder.path().string()).status().message(),
            folder.path().string() + ": not a file");
  testing::write(folder.at("empty"), "");
  EXPECT_EQ(SafetensorsFile::open(folder.at("empty")).status().message(),
            folder.at("empty") + ": HeaderTooSmall: the file has 0 bytes, 8 are the least");
}

TEST(Safetensors, TruncatedAtEveryLengthIsAnError) {
  const std::string whole = contents(golden("llama/model.safetensors"));
  ASSERT_GT(whole.size(), 1000u);
  ASSERT_TRUE(parse(whole).ok());
  // Every length within the header and some after it: there the answer cannot change.
  for (std::size_t length = 0; length < whole.size(); length += length < 3000 ? 1 : 97) {
    EXPECT_FALSE(parse(whole.substr(0, length)).ok()) << length;
  }
  EXPECT_FALSE(parse(whole.substr(0, whole.size() - 1)).ok());
  EXPECT_FALSE(parse(whole + '\0').ok());
}

// Whatever parse accepts must describe the file exactly.
void expect_sound(const SafetensorsHeader& header, std::size_t file_bytes) {
  std::uint64_t end = 0;
  for (const StoredTensor& tensor : header.tensors) {
    std::uint64_t bits = static_cast<std::uint64_t>(size_bits(tensor.type));
    for (const std::uint64_t size : tensor.shape) {
      bits *= size;
    }
    EXPECT_EQ(tensor.begin, end);
    EXPECT_EQ(tensor.end - tensor.begin, bits / 8);
    end = tensor.end;
  }
  EXPECT_EQ(header.data_begin + end, file_bytes);
}

TEST(Safetensors, EachHeaderByteFlippedIsAnErrorOrASoundFile) {
  const std::string whole =
      file_of(R"({"__metadata__":{"format":"pt"},"a":{"dtype":"F32","shape":[2,3],)"
              R"("data_offsets":[0,24]},"b\n":{"dtype":"BF16","shape":[],"data_offsets":[24,26]}})",
              26);
  std::size_t accepted = 0, refused = 0;
  for (std::size_t i = 0; i + 26 < whole.size(); ++i) {
    for (int byte = 0; byte < 256; ++byte) {
      std::string changed = whole;
      changed[i] = static_cast<char>(byte);
      const auto result = parse(changed);
      result.ok() ? ++accepted : ++refused;
      if (result.ok()) {
        expect_sound(*result, changed.size());
      }
    }
  }
  EXPECT_GT(accepted, 1000u);  // the unchanged file and letters within names
  EXPECT_GT(refused, 10000u);
}

TEST(Safetensors, EachHeaderByteOfARealFileFlipped) {
  const std::string whole = contents(golden("qwen2/model.safetensors"));
  const auto header = parse(whole);
  ASSERT_TRUE(header.ok());
  const std::size_t names = header->tensors.size();
  std::size_t accepted = 0, refused = 0;
  for (std::size_t i = 0; i < header->data_begin; ++i) {
    for (const int bit : {0, 3, 7}) {
      std::string changed = whole;
      changed[i] = static_cast<char>(changed[i] ^ 1 << bit);
      const auto result = parse(changed);
      result.ok() ? ++accepted : ++refused;
      if (result.ok()) {
        expect_sound(*result, changed.size());
        EXPECT_EQ(result->tensors.size(), names);
      }
    }
  }
  // A letter within a name is another name, a byte of the length or of the syntax an error; bit 7
  // alone is never UTF-8.
  EXPECT_GT(accepted, 100 * names / 10);
  EXPECT_GT(refused, header->data_begin);
  std::string renamed = whole;
  renamed[whole.find("embed_tokens")] = 'E';
  const auto other = parse(renamed);
  ASSERT_TRUE(other.ok()) << other.status();
  EXPECT_EQ(std::ranges::count(other->tensors, "model.Embed_tokens.weight", &StoredTensor::name),
            1);
}

std::vector<NamedTensor> mixed_tensors() {
  return {{"f32", Tensor::from<float>(std::vector<float>{1, 2, 3, 4, 5, 6}, Shape{2, 3})},
          {"bf16", Tensor::full(Shape{3}, DType::bf16, -1.5)},
          {"i64", Tensor::from<std::int64_t>(std::vector<std::int64_t>{7, -8}, Shape{2})},
          {"i32", Tensor::full(Shape{1, 1, 1}, DType::i32, 9)},
          {"f64", Tensor::full(Shape{}, DType::f64, 0.1)},
          {"a\"b\\\n\x01\x7f\xc3\xa9", Tensor::zeros(Shape{0, 4}, DType::f32)}};
}

TEST(Safetensors, WritesTheReferenceVector) {
  const Folder folder;
  const std::vector<NamedTensor> one = {{"attn.0", Tensor::zeros(Shape{1, 2, 3}, DType::f32)}};
  ASSERT_TRUE(write_safetensors(folder.at("a"), one, {}).ok());
  EXPECT_EQ(contents(folder.at("a")),
            std::string("@\0\0\0\0\0\0\0", 8) +
                R"({"attn.0":{"dtype":"F32","shape":[1,2,3],"data_offsets":[0,24]}})" +
                std::string(24, '\0'));
  ASSERT_TRUE(write_safetensors(folder.at("b"), {}, {}).ok());
  EXPECT_EQ(contents(folder.at("b")), std::string("\x08\0\0\0\0\0\0\0{}      ", 16));
}

TEST(Safetensors, OrdersByTypeThenName) {
  const Folder folder;
  ASSERT_TRUE(write_safetensors(folder.at("a"), mixed_tensors()).ok());
  const std::string text = contents(folder.at("a"));
  EXPECT_EQ(text.substr(8, 32), R"({"__metadata__":{"format":"pt"},)");
  EXPECT_EQ(static_cast<unsigned char>(text[0]) % 8, 0);
  const auto file = SafetensorsFile::open(folder.at("a"));
  ASSERT_TRUE(file.ok()) << file.status();
  std::vector<std::string> names;
  for (const StoredTensor& tensor : file->tensors()) {
    names.push_back(tensor.name);
  }
  EXPECT_THAT(names, ::testing::ElementsAre("i64", "f64", "a\"b\\\n\x01\x7f\xc3\xa9", "f32", "i32",
                                            "bf16"));
  EXPECT_EQ(file->metadata(), (Metadata{{"format", "pt"}}));
}

TEST(Safetensors, RoundTripIsBitwise) {
  const Folder folder;
  const auto tensors = mixed_tensors();
  ASSERT_TRUE(write_safetensors(folder.at("a"), tensors).ok());
  const auto file = SafetensorsFile::open(folder.at("a"));
  ASSERT_TRUE(file.ok()) << file.status();
  std::vector<NamedTensor> again;
  for (const auto& [name, tensor] : tensors) {
    auto read = file->read(name);
    ASSERT_TRUE(read.ok()) << read.status();
    EXPECT_EQ(read->shape(), tensor.shape());
    EXPECT_EQ(read->dtype(), tensor.dtype());
    if (tensor.numel() > 0) {
      EXPECT_EQ(std::memcmp(read->raw(), tensor.raw(), static_cast<std::size_t>(tensor.bytes())),
                0);
    }
    again.push_back({name, *read});
  }
  ASSERT_TRUE(write_safetensors(folder.at("b"), again).ok());
  EXPECT_EQ(contents(folder.at("a")), contents(folder.at("b")));
}

// These files were written by the reference writer.
TEST(Safetensors, RewritesReferenceFilesByteForByte) {
  const Folder folder;
  for (const std::string name :
       {"gpt2/model.safetensors", "llama/model.safetensors",
        "qwen2_lora/adapter/adapter_model.safetensors", "clip/model.safetensors"}) {
    SCOPED_TRACE(name);
    const auto file = SafetensorsFile::open(golden(name).string());
    ASSERT_TRUE(file.ok()) << file.status();
    std::vector<NamedTensor> tensors;
    for (const StoredTensor& tensor : file->tensors()) {
      tensors.push_back({tensor.name, *file->read(tensor.name)});
    }
    std::reverse(tensors.begin(), tensors.end());
    ASSERT_TRUE(write_safetensors(folder.at("a"), tensors, file->metadata()).ok());
    EXPECT_TRUE(contents(folder.at("a")) == contents(golden(name)));
  }
}

TEST(Safetensors, ReadsWithoutACopyAndNeverWritesTheFile) {
  const std::int64_t before = allocator(cpu).report().live_bytes;
  const Folder folder;
  const std::string path = folder.at("a");
  {
    const std::vector<NamedTensor> one = {{"a", Tensor::full(Shape{64}, DType::f32, 2)}};
    ASSERT_TRUE(write_safetensors(path, one).ok());
  }
  Tensor view;
  {
    const auto file = SafetensorsFile::open(path);
    ASSERT_TRUE(file.ok());
    view = *file->read("a");
  }
  EXPECT_EQ(allocator(cpu).report().live_bytes, before);  // the view is not the allocator's
  EXPECT_EQ(view.to_vector<float>(), std::vector<float>(64, 2));
  view.data<float>()[0] = 5;
  EXPECT_EQ(view.to_vector<float>()[0], 5);
  EXPECT_EQ(SafetensorsFile::open(path)->read("a")->to_vector<float>()[0], 2);
}

TEST(Safetensors, CopiesWhatIsNotAligned) {
  const Folder folder;
  const std::string header = R"({"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}})";
  ASSERT_NE((header.size() + 8) % 4, 0u);
  std::string file = file_of(header, 0);
  const float values[] = {1.25f, -3};
  file.append(reinterpret_cast<const char*>(values), sizeof values);
  testing::write(folder.at("a"), file);
  const auto opened = SafetensorsFile::open(folder.at("a"));
  ASSERT_TRUE(opened.ok()) << opened.status();
  EXPECT_EQ(opened->read("a")->to_vector<float>(), (std::vector<float>{1.25f, -3}));
}

float half(std::uint16_t bits) {
  const Folder folder;
  std::string file = file_of(R"({"a":{"dtype":"F16","shape":[1],"data_offsets":[0,2]}})", 0);
  file.append(reinterpret_cast<const char*>(&bits), 2);
  testing::write(folder.at("a"), file);
  return SafetensorsFile::open(folder.at("a"))->read("a")->item<float>();
}

TEST(Safetensors, ConvertsHalves) {
  EXPECT_EQ(half(0x3c00), 1.0f);
  EXPECT_EQ(half(0xc000), -2.0f);
  EXPECT_EQ(half(0x3555), 0.333251953125f);
  EXPECT_EQ(half(0x7bff), 65504.0f);
  EXPECT_EQ(half(0x0400), 0x1p-14f);
  EXPECT_EQ(half(0x0001), 0x1p-24f);
  EXPECT_EQ(half(0x83ff), -0x1.ff8p-15f);
  EXPECT_TRUE(std::signbit(half(0x8000)));
  EXPECT_EQ(half(0x7c00), std::numeric_limits<float>::infinity());
  EXPECT_TRUE(std::isnan(half(0x7e00)));
}

TEST(Safetensors, ConvertsOnLoad) {
  const Folder folder;
  const std::vector<NamedTensor> tensors = {
      {"f", Tensor::from<float>(std::vector<float>{1, 1.00390625f, 1.01171875f, -3e38f}, Shape{4})},
      {"d", Tensor::full(Shape{2}, DType::f64, 0.1)},
      {"i", Tensor::full(Shape{2}, DType::i32, -4)},
      {"l", Tensor::full(Shape{2}, DType::i64, -5)}};
  ASSERT_TRUE(write_safetensors(folder.at("a"), tensors).ok());
  const auto file = SafetensorsFile::open(folder.at("a"));
  ASSERT_TRUE(file.ok());
  const Tensor brief = Tensor::empty(Shape{4}, DType::bf16);
  ASSERT_TRUE(file->read_into("f", brief).ok());
  // Ties go to even: 1 + 1/256 down, 1 + 3/256 up.
  const auto bits = brief.to_vector<bfloat16>();
  EXPECT_EQ(to_float(bits[0]), 1.0f);
  EXPECT_EQ(to_float(bits[1]), 1.0f);
  EXPECT_EQ(to_float(bits[2]), 1.015625f);
  EXPECT_EQ(bits[3].bits, to_bfloat16(-3e38f).bits);
  const Tensor wide = Tensor::empty(Shape{4}, DType::f64);
  ASSERT_TRUE(file->read_into("f", wide).ok());
  EXPECT_EQ(wide.to_vector<double>()[1], 1.00390625);
  const Tensor narrow = Tensor::empty(Shape{2}, DType::f32);
  ASSERT_TRUE(file->read_into("d", narrow).ok());
  EXPECT_EQ(narrow.to_vector<float>()[1], 0.1f);
  const Tensor ids = Tensor::empty(Shape{2}, DType::i64);
  ASSERT_TRUE(file->read_into("i", ids).ok());
  EXPECT_EQ(ids.to_vector<std::int64_t>(), (std::vector<std::int64_t>{-4, -4}));
  // Into a view with strides.
  const Tensor table = Tensor::zeros(Shape{2, 2}, DType::f32);
  const Tensor column = table.slice(1, 0, 1).reshape(Shape{2, 1});
  EXPECT_FALSE(file->read_into("d", column).ok());
  const Tensor square = Tensor::zeros(Shape{4, 2}, DType::f32);
  ASSERT_TRUE(file->read_into("f", square.slice(1, 1, 2).as_view(Shape{4}, {2}, 1)).ok());
  EXPECT_EQ(square.to_vector<float>()[3], 1.00390625f);
  EXPECT_EQ(square.to_vector<float>()[2], 0);

  EXPECT_EQ(file->read_into("f", ids).message(),
            folder.at("a") + ": tensor \"f\" must have shape [2], got [4]");
  EXPECT_EQ(file->read_into("d", ids).message(),
            folder.at("a") + ": tensor \"d\" of type F64 cannot be read as i64");
  EXPECT_EQ(file->read_into("l", narrow).message(),
            folder.at("a") + ": tensor \"l\" of type I64 cannot be read as f32");
  EXPECT_EQ(file->read_into("none", ids).message(),
            folder.at("a") + ": there is no tensor \"none\"");
  EXPECT_EQ(file->read("none").status().code(), absl::StatusCode::kNotFound);
  const Tensor shape_only = Tensor::empty(Shape{4}, DType::bf16, meta);
  EXPECT_TRUE(file->read_into("f", shape_only).ok());
  EXPECT_FALSE(file->read_into("l", Tensor::empty(Shape{2}, DType::f32, meta)).ok());
}

TEST(Safetensors, ReadsSomeRows) {
  const Folder folder;
  std::vector<float> values;
  for (int i = 0; i < 12; ++i) {
    values.push_back(static_cast<float>(i));
  }
  ASSERT_TRUE(write_safetensors(folder.at("a"),
                                std::vector<NamedTensor>{{"x", Tensor::from(values, Shape{4, 3})},
                                                         {"s", Tensor::zeros(Shape{}, DType::f32)}})
                  .ok());
  const auto file = SafetensorsFile::open(folder.at("a"));
  ASSERT_TRUE(file.ok()) << file.status();
  const Tensor two = Tensor::empty(Shape{2, 3}, DType::f32);
  ASSERT_TRUE(file->read_rows_into("x", 1, two).ok());
  EXPECT_EQ(two.to_vector<float>(), (std::vector<float>{3, 4, 5, 6, 7, 8}));
  const Tensor narrow = Tensor::empty(Shape{1, 3}, DType::bf16);
  ASSERT_TRUE(file->read_rows_into("x", 3, narrow).ok());
  EXPECT_EQ(to_float(narrow.data<bfloat16>()[2]), 11);
  ASSERT_TRUE(file->read_rows_into("x", 2, Tensor::empty(Shape{2, 3}, DType::f32, meta)).ok());
  const auto problem = [&](std::string_view name, std::int64_t first, const Shape& shape) {
    return std::string(
        file->read_rows_into(name, first, Tensor::empty(shape, DType::f32)).message());
  };
  EXPECT_EQ(problem("x", 3, Shape{2, 3}), folder.at("a") +
                                              ": tensor \"x\" must have rows 3 and on of shape "
                                              "[2, 3], got [4, 3]");
  for (const std::int64_t first : {std::int64_t{-1}, std::int64_t{3}, INT64_MAX}) {
    EXPECT_NE(problem("x", first, Shape{2, 3}), "");
  }
  EXPECT_NE(problem("x", 0, Shape{2, 2}), "");
  EXPECT_NE(problem("x", 0, Shape{6}), "");
  EXPECT_NE(problem("s", 0, Shape{}), "");
  EXPECT_NE(problem("other", 0, Shape{2, 3}), "");
}

TEST(Safetensors, TellsOfTensorsThatItCannotHold) {
  const Folder folder;
  testing::write(
      folder.at("a"),
      file_of(R"({"u":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},)"
              R"("r":{"dtype":"F32","shape":[1,1,1,1,1,1,0],"data_offsets":[1,1]},)"
              R"("s":{"dtype":"F32","shape":[0,9223372036854775808],"data_offsets":[1,1]}})",
              1));
  const auto file = SafetensorsFile::open(folder.at("a"));
  ASSERT_TRUE(file.ok()) << file.status();
  EXPECT_EQ(file->read("u").status().message(),
            folder.at("a") + ": tensor \"u\" of type U8 cannot be read");
  EXPECT_EQ(file->read("r").status().message(),
            folder.at("a") + ": tensor \"r\" has 7 dimensions, 6 are the most");
  EXPECT_EQ(file->read("s").status().message(),
            folder.at("a") + ": tensor \"s\" of shape [0, 9223372036854775808] is too large");
}

TEST(Safetensors, RefusesToWriteWhatWouldNotComeBack) {
  const Folder folder;
  const std::string path = folder.at("a");
  testing::write(path, "before");
  const Tensor x = Tensor::zeros(Shape{2, 4}, DType::f32);
  const auto status = [&](std::vector<NamedTensor> tensors, const Metadata& metadata = {}) {
    return std::string(write_safetensors(path, tensors, metadata).message());
  };
  EXPECT_EQ(status({{"a", x}, {"a", x.clone()}}), path + ": tensor \"a\" is given twice");
  EXPECT_EQ(status({{"a", x}, {"b", x}}),
            path + ": tensors \"a\" and \"b\" share memory: write one of them");
  EXPECT_EQ(status({{"b", x.slice(1, 1, 3)}, {"a", x}}),
            path + ": tensors \"a\" and \"b\" share memory: write one of them");
  EXPECT_EQ(status({{"__metadata__", x}}), path + ": a tensor cannot be called \"__metadata__\"");
  EXPECT_EQ(status({{"\xff", x}}), path + ": a tensor cannot be called \"\xff\"");
  EXPECT_EQ(status({{"a", x}}, {{"k", "\xff"}}), path + ": metadata \"k\" must be UTF-8");
  EXPECT_EQ(status({{"a", Tensor()}}), path + ": tensor \"a\" has no elements");
  EXPECT_EQ(status({{"a", Tensor::empty(Shape{1}, DType::f32, meta)}}),
            path + ": tensor \"a\" has no elements");
  EXPECT_EQ(contents(path), "before");
  // Slices side by side share nothing; other strides are written as they read.
  const Tensor column = x.slice(1, 1, 2);
  x.data<float>()[5] = 3;
  EXPECT_EQ(status({{"a", x.slice(0, 0, 1)}, {"b", x.slice(0, 1, 2)}}), "");
  EXPECT_EQ(status({{"a", column}}), "");
  EXPECT_EQ(SafetensorsFile::open(path)->read("a")->to_vector<float>(), (std::vector<float>{0, 3}));
}

TEST(Safetensors, AFailedWriteLeavesTheTargetAndNoRest) {
  const Folder folder;
  const std::vector<NamedTensor> one = {{"a", Tensor::zeros(Shape{4}, DType::f32)}};
  const absl::Status missing = write_safetensors(folder.at("none/a"), one);
  EXPECT_EQ(missing.code(), absl::StatusCode::kNotFound);
  EXPECT_THAT(std::string(missing.message()), StartsWith(folder.at("none/a")));
  // A folder of that name: the rename fails after everything was written.
  std::filesystem::create_directory(folder.at("taken"));
  testing::write(folder.at("taken/x"), "");
  EXPECT_FALSE(write_safetensors(folder.at("taken"), one).ok());
  const auto entries = std::filesystem::directory_iterator(folder.path());
  EXPECT_EQ(std::distance(begin(entries), end(entries)), 1);
  // No room in the middle of the tensors.
  struct rlimit before {};
  ASSERT_EQ(::getrlimit(RLIMIT_FSIZE, &before), 0);
  const struct rlimit little { 4096, before.rlim_max };
  const auto handler = std::signal(SIGXFSZ, SIG_IGN);
  ASSERT_EQ(::setrlimit(RLIMIT_FSIZE, &little), 0);
  const std::vector<NamedTensor> large = {{"a", Tensor::zeros(Shape{1 << 16}, DType::f32)}};
  const absl::Status full = write_safetensors(folder.at("a"), large);
  ASSERT_EQ(::setrlimit(RLIMIT_FSIZE, &before), 0);
  std::signal(SIGXFSZ, handler);
  EXPECT_FALSE(full.ok());
  const auto rest = std::filesystem::directory_iterator(folder.path());
  EXPECT_EQ(std::distance(begin(rest), end(rest)), 1);
}

}  // namespace
}  // namespace reprise::nn
