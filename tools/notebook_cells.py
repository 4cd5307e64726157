"""The code cells of the notebook that quantize_catdog.py ports, as they stand, for tools/compare_notebook.py.

One line is changed: the checkpoint holds a state_dict, not a pickled module. Run it in a folder with
cat_dog/val and BEST_checkpoint.pth.tar.
"""
import os
from PIL import Image
import numpy as np
import torch
import torch.nn as nn
import torch.optim as optim
import torchnet.meter as tnt
from torch.utils.data import Dataset, DataLoader

os.environ['CUDA_VISIBLE_DEVICES'] = '0'
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")


class CNN_Model(nn.Module):
    def __init__(self):
        super(CNN_Model, self).__init__()
        # Convolution 1 , input_shape=(3,224,224)
        self.scale_input = torch.tensor(1.0) # quant-scale
        self.range_input = torch.tensor(1.0) # quant-range
        self.cnn1 = nn.Conv2d(in_channels=3, out_channels=16, kernel_size=5, stride=1, padding=0)
        self.bn1 = nn.BatchNorm2d(16)
        self.relu1 = nn.ReLU()
        self.scale_cv1 = torch.tensor(1.0) # quant-scale
        self.range_cv1 = torch.tensor(1.0) # quant-range
        # Max pool 1
        self.maxpool1 = nn.MaxPool2d(kernel_size=2)
        # Convolution 2
        self.cnn2 = nn.Conv2d(in_channels=16, out_channels=32, kernel_size=5, stride=1, padding=0)
        self.bn2 = nn.BatchNorm2d(32)
        self.relu2 = nn.ReLU()
        self.scale_cv2 = torch.tensor(1.0) # quant-scale
        self.range_cv2 = torch.tensor(1.0) # quant-range
        # Max pool 2
        self.maxpool2 = nn.MaxPool2d(kernel_size=2)
        # Convolution 3
        self.cnn3 = nn.Conv2d(in_channels=32, out_channels=16, kernel_size=3, stride=1, padding=0)
        self.bn3 = nn.BatchNorm2d(16)
        self.relu3 = nn.ReLU()
        self.scale_cv3 = torch.tensor(1.0) # quant-scale
        self.range_cv3 = torch.tensor(1.0) # quant-range
        # Max pool 3
        self.maxpool3 = nn.MaxPool2d(kernel_size=2)
        # Convolution 4
        self.cnn4 = nn.Conv2d(in_channels=16, out_channels=8, kernel_size=3, stride=1, padding=0)
        self.bn4 = nn.BatchNorm2d(8)
        self.relu4 = nn.ReLU()
        self.scale_cv4 = torch.tensor(1.0) # quant-scale
        self.range_cv4 = torch.tensor(1.0) # quant-range
        # Max pool 4
        self.maxpool4 = nn.MaxPool2d(kernel_size=2)
        # Fully connected 1 ,#input_shape=(8*12*12)
        self.fc1 = nn.Linear(8 * 11 * 11, 512) 
        self.relu5 = nn.ReLU()
        self.scale_fc1 = torch.tensor(1.0) # quant-scale
        self.range_fc1 = torch.tensor(1.0) # quant-range
        self.fc2 = nn.Linear(512, 2)
        self.scale_fc2 = torch.tensor(1.0) # quant-scale
        self.range_fc2 = torch.tensor(1.0) # quant-range
        self.output = nn.Softmax(dim=1)
        
        self.bit = 8
        self.x_bit = 2**(self.bit - 1) - 1
        self.w_bit = 2**(self.bit - 1) - 1
        self.y_bit = 2**(self.bit - 1) - 1
        self.b_bit = 2**(self.bit*2 - 1) - 1
        
        self.Quantization = False
        
    def update_range(self, data, range_data):
        now_range = data.abs().max()
        if now_range > range_data:
            return now_range
        else:
            return range_data
        
    def quantize(self, x, scale, int_range):
        xq = torch.round(x * scale)
        xq = torch.clip(xq, -int_range, int_range)
        return xq
        
    def weight_quant(self, w, b, in_scale):
        # scale of weight
        scale_w = (2**(self.bit - 1) - 1) / w.abs().max()
        # quantize weight
        wq = self.quantize(w, scale_w, self.w_bit)
        # scale of bias
        scale_b = scale_w * in_scale
        # quantize bais
        bq = self.quantize(b, scale_b, self.b_bit)
        
        return wq, bq, scale_w
        
    def fusion_conv_bn_quant(self, conv, bn, in_scale):
        # fusion conv and bn parameter
        conv_w = conv.weight
        conv_b = conv.bias
        bn_gamma = bn.weight / torch.pow(bn.running_var + bn.eps, 0.5)
        bn_beta = bn.bias - bn.running_mean * bn_gamma
        fusion_w = conv_w * bn_gamma.unsqueeze(-1).unsqueeze(-1).unsqueeze(-1)
        fusion_b = conv_b * bn_gamma + bn_beta
        
        wq, bq, scale_w = self.weight_quant(fusion_w, fusion_b, in_scale)
        
        # update parameter
        conv.weight.data = wq
        conv.bias.data = bq
        bn.running_var /= bn.running_var
        bn.running_mean *= 0.0
        bn.weight.data /= bn.weight
        bn.bias.data *= 0.0
        
        return conv, bn, scale_w
        
    def cl_scale(self):
        # Quantize activation tensor
        self.scale_input = (2**(self.bit - 1) - 1) / self.range_input
        self.scale_cv1 = (2**(self.bit - 1) - 1) / self.range_cv1
        self.scale_cv2 = (2**(self.bit - 1) - 1) / self.range_cv2
        self.scale_cv3 = (2**(self.bit - 1) - 1) / self.range_cv3
        self.scale_cv4 = (2**(self.bit - 1) - 1) / self.range_cv4
        self.scale_fc1 = (2**(self.bit - 1) - 1) / self.range_fc1
        self.scale_fc2 = (2**(self.bit - 1) - 1) / self.range_fc2
        
        self.cnn1, self.bn1, self.cnn1_w_scale = self.fusion_conv_bn_quant(self.cnn1, self.bn1, self.scale_input)
        self.cnn2, self.bn2, self.cnn2_w_scale = self.fusion_conv_bn_quant(self.cnn2, self.bn2, self.scale_cv1)
        self.cnn3, self.bn3, self.cnn3_w_scale = self.fusion_conv_bn_quant(self.cnn3, self.bn3, self.scale_cv2)
        self.cnn4, self.bn4, self.cnn4_w_scale = self.fusion_conv_bn_quant(self.cnn4, self.bn4, self.scale_cv3)
        
        self.fc1.weight.data, self.fc1.bias.data, self.fc1_w_scale = self.weight_quant(self.fc1.weight, self.fc1.bias, self.scale_cv4)
        self.fc2.weight.data, self.fc2.bias.data, self.fc2_w_scale = self.weight_quant(self.fc2.weight, self.fc2.bias, self.scale_fc1)
        
        
    
    def forward(self, x):
        if not self.Quantization:
            self.range_input = self.update_range(x, self.range_input) # quant-觀察數據範圍
            out = self.cnn1(x)
            out = self.bn1(out)
            out = self.relu1(out)
            self.range_cv1 = self.update_range(out, self.range_cv1) # quant-觀察數據範圍
            out = self.maxpool1(out)
            out = self.cnn2(out)
            out = self.bn2(out)
            out = self.relu2(out)
            self.range_cv2 = self.update_range(out, self.range_cv2) # quant-觀察數據範圍
            out = self.maxpool2(out)
            out = self.cnn3(out)
            out = self.bn3(out)
            out = self.relu3(out)
            self.range_cv3 = self.update_range(out, self.range_cv3) # quant-觀察數據範圍
            out = self.maxpool3(out)
            out = self.cnn4(out)
            out = self.bn4(out)
            out = self.relu4(out)
            self.range_cv4 = self.update_range(out, self.range_cv4) # quant-觀察數據範圍
            out = self.maxpool4(out)
            out = out.view(out.size(0), -1)
            out = self.fc1(out)
            self.range_fc1 = self.update_range(out, self.range_fc1) # quant-觀察數據範圍
            out = self.fc2(out)
            self.range_fc2 = self.update_range(out, self.range_fc2) # quant-觀察數據範圍
        else:
            xq = self.quantize(x, self.scale_input, self.x_bit) # quant fp32 to int8
            out = self.cnn1(xq)
            out = self.relu1(out)
            out = torch.clip(torch.round(out * self.scale_cv1 / (self.scale_input * self.cnn1_w_scale)), -self.x_bit, self.x_bit)
            out = self.maxpool1(out)
            out = self.cnn2(out)
            out = self.relu2(out)
            out = torch.clip(torch.round(out * self.scale_cv2 / (self.scale_cv1 * self.cnn2_w_scale)), -self.x_bit, self.x_bit)
            out = self.maxpool2(out)
            out = self.cnn3(out)
            out = self.relu3(out)
            out = torch.clip(torch.round(out * self.scale_cv3 / (self.scale_cv2 * self.cnn3_w_scale)), -self.x_bit, self.x_bit)
            out = self.maxpool3(out)
            out = self.cnn4(out)
            out = self.relu4(out)
            out = torch.clip(torch.round(out * self.scale_cv4 / (self.scale_cv3 * self.cnn4_w_scale)), -self.x_bit, self.x_bit)
            out = self.maxpool4(out)
            out = out.view(out.size(0), -1)
            out = self.fc1(out)
            out = torch.clip(torch.round(out * self.scale_fc1 / (self.scale_cv4 * self.fc1_w_scale)), -self.x_bit, self.x_bit)
            out = self.fc2(out)
            out = torch.clip(torch.round(out * self.scale_fc2 / (self.scale_fc1 * self.fc2_w_scale)), -self.x_bit, self.x_bit)
            

        return out


class dataset(Dataset):
    def __init__(self, datapath, datasize=(224, 224), mode='train'):
        self.datapath = datapath
        self.datasize = datasize
        self.mode = mode
        self.datanames = os.listdir(os.path.join(self.datapath, self.mode))

    def __len__(self):
        return len(self.datanames)
    
    def __getitem__(self, idx):
        
        image_path = os.path.join(self.datapath, self.mode, self.datanames[idx])
        image = Image.open(image_path, mode='r')
        image = image.convert('RGB')
        image = image.resize(self.datasize)
        image = np.array(image).transpose(2,0,1)
        
        if 'cat' in self.datanames[idx]:
            label = [0]
        else:
            label = [1]
        
        image = torch.FloatTensor(image)
        label = torch.LongTensor(label)
        
        return image, label
     
    def collate_fn(self, batch):
        imgs = list()
        labels = list()
        for b in batch:
            imgs.append(b[0])
            labels.append(b[1])
        imgs = torch.stack(imgs, dim=0)
        labels = torch.stack(labels, dim=0)
        return imgs, labels


# number of subprocesses to use for data loading
num_workers = 0
# how many samples per batch to load
batch_size = 5
train_dataset = dataset('cat_dog', datasize=(224, 224), mode='val')
train_loader = DataLoader(train_dataset,
                          batch_size=batch_size,
                          shuffle=True,
                          collate_fn=train_dataset.collate_fn)


model = CNN_Model()

# Load pre-train model
checkpoint_backbone = torch.load('BEST_checkpoint.pth.tar', map_location=torch.device('cpu'))
best_model = checkpoint_backbone['model']
pretrained_dict = best_model
model_dict = model.state_dict()
pretrained_dict = {k: v for k, v in pretrained_dict.items() if k in model_dict}
print("pretrained_dict:\n", pretrained_dict.keys())
model_dict.update(pretrained_dict)
model.load_state_dict(model_dict)

model.to(device)
model.eval()


classerr = tnt.ClassErrorMeter(accuracy=True, topk=(1, 2))

end_i = train_loader.__len__()

for i, data in enumerate(train_loader, 0):
    inputs, labels = data
    inputs = inputs.to(device)
    labels = labels.to(device).squeeze(-1)

    outputs = model(inputs)

    classerr.add(outputs.data, labels)

    Top1 = classerr.value()[0]

    print('FP32 Top1: {:.3f}, {}/{}\n'.format(Top1, i, end_i))


model.cl_scale()
model.Quantization = True

for i, data in enumerate(train_loader, 0):
    inputs, labels = data
    inputs = inputs.to(device)
    labels = labels.to(device).squeeze(-1)

    outputs = model(inputs)

    outputs /= model.fc2_w_scale
    # print(outputs)

    classerr.add(outputs.data, labels)

    Top1 = classerr.value()[0]

    print('INT8 Top1: {:.3f}, {}/{}\n'.format(Top1, i, end_i))
